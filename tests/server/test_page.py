"""The page in a real Chromium, over a real server: keyboard, streams, experts, contrast, and what it may not.

The browser's tests are slow ones, and skip where no Chromium is (`apt install chromium`). The model's weights
are random; where a test needs an answer of its own, it adds a grammar to the page's request on the way, so
that the engine writes that answer token by token. Screenshots go to SHOAL_SHOTS, or to pytest's own folder.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from shoal.server.history import HEAT_EVERY, History
from shoal.server.page import FILES
from tests.server.conftest import PATIENCE, Server, Start

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Route

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = (
    "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script> "
    "[a](javascript:alert(1))"
)
CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
    '```json\n{"town":"Ulm"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Of a town.", "parameters": {}}}]


@pytest.fixture(scope="module")
def served(launch: Start) -> Server:
    return launch("--ui", "--max-sequences", "8")


# ----------------------------------------------------------------------------------------------------
# Without a browser


def test_the_files_need_no_key_and_what_they_ask_for_does(launch: Start) -> None:
    server = launch("--ui", env={"SHOAL_API_KEY": "secret"})
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as http:
        for path in ("/", *(f"/page/{name}" for name in FILES)):
            answer = http.get(path)
            assert answer.status_code == 200, path
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert http.get(path, headers={"if-none-match": answer.headers["etag"]}).status_code == 304
        for path in ("model.json", "state.json", "heat.json", "plan.json"):
            assert http.get(f"/page/{path}").status_code == 401
            assert http.get(f"/page/{path}", headers={"authorization": "Bearer secret"}).status_code == 200
    assert server.stop() == 0


def test_no_file_names_another_place_or_makes_html_of_text(served: Server) -> None:
    for name in FILES:
        text = served.ask("GET", f"/page/{name}").text
        assert set(re.findall(r"https?://[\w.]+", text)) <= {"http://www.w3.org"}, (
            name
        )  # SVG's name, no address
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text), name


def test_without_ui_there_is_no_page(server: Server) -> None:
    assert server.ask("GET", "/").status_code == 404


def test_the_plan_is_that_of_the_loaded_model_and_refuses_nonsense(served: Server) -> None:
    with httpx.Client(base_url=f"{served.url}/page", timeout=PATIENCE) as http:
        plan = http.get("/plan.json", params={"gpu": "h100", "batch": 4}).json()
        assert plan["parameters"]["total"] > 0
        assert (plan["hardware"]["gpu"], plan["serving"]["point"]["batch"]) == ("h100", 4)
        for wrong, why in (
            ({"gpu": "h9"}, "h9"),
            ({"count": "-1"}, "1 or more"),
            ({"colour": "red"}, "colour"),
        ):
            answer = http.get("/plan.json", params=wrong)
            assert answer.status_code == 400
            assert why in answer.json()["error"]["message"]
        assert http.get("/heat.json", params={"layer": 99}).status_code == 400
        assert http.get("/nothing.js").status_code == 404


def test_the_history_is_of_differences_and_forgets_an_engine_that_ended() -> None:
    process: Any = SimpleNamespace(stats={})
    history = History(process)
    history.sample(0.0)
    assert history.since(-1) == []
    names = ("running", "waiting", "pages", "pages_free", "prompt_positions", "prompt_positions_cached")
    plain = dict.fromkeys((*names, "generated", "preemptions"), 1)
    for second in range(3 * HEAT_EVERY):
        counts = [[second, 0], [0, 2 * second]]
        process.stats = {**plain, "steps": second, "expert_tokens": counts}
        history.sample(float(second))
    assert [row[0] for row in history.since(11.0)] == [12.0, 13.0, 14.0]
    heat = history.heat(1)
    assert heat["load"] == [[10, 0], [0, 20]]
    assert heat["over_time"] == [[0, 10], [0, 10]]
    process.stats = {**process.stats, "steps": 0}
    history.sample(99.0)
    assert [row[0] for row in history.since(0.0)] == [99.0]


# ----------------------------------------------------------------------------------------------------
# In Chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, a development dependency")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"], timeout=1000 * PATIENCE
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = os.environ.get("SHOAL_SHOTS")
    return tmp_path_factory.mktemp("shots") if folder is None else Path(folder)


Open = Callable[..., "Page"]


@pytest.fixture
def view(browser: Browser, served: Server) -> Iterator[Open]:
    """A page on the server, ready. What the page may never do is checked of each when the test is over."""
    opened: list[Page] = []
    foreign: list[str] = []
    said: list[str] = []

    def start(*, extra: dict[str, Any] | None = None, refused: bool = False, **settings: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **settings})
        page = context.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.on(
            "request",
            lambda request: None if request.url.startswith(served.url) else foreign.append(request.url),
        )

        def hear(line: ConsoleMessage) -> None:
            if line.type in ("error", "warning") and not (refused and "status of 400" in line.text):
                said.append(line.text)

        page.on("console", hear)
        page.on("pageerror", lambda error: said.append(str(error)))

        def add(route: Route) -> None:
            body = json.loads(route.request.post_data or "{}")
            route.continue_(post_data=json.dumps({**body, **(extra or {})}))

        page.route("**/v1/**", add)
        page.goto(served.url)
        page.locator("#state[data-state=ready]").wait_for()
        opened.append(page)
        return page

    yield start
    for page in opened:
        page.context.close()
    assert foreign == [], "the page asked another place"
    assert said == [], "errors, or violations of the policy"


def ask(page: Page, text: str) -> None:
    page.locator("#prompt").fill(text)
    page.keyboard.press("Enter")


def wait_for_end(page: Page) -> None:
    page.locator(".turn.model").first.wait_for(state="attached")
    until(page, "!document.querySelector('.turn.model[aria-busy]')")
    page.locator("#send").wait_for()


def until(page: Page, holds: str, arg: Any = None) -> None:
    """Wait for an expression, or a function of `arg`. (Playwright's own waiting needs eval, which the policy
    forbids.)"""
    end = time.monotonic() + PATIENCE
    while not page.evaluate(holds, arg):
        assert time.monotonic() < end, f"not within {PATIENCE} s: {holds}"
        page.wait_for_timeout(30)


def force(text: str) -> dict[str, Any]:
    return {"structured_outputs": {"choice": [text]}, "max_tokens": 600, "ignore_eos": False}


@pytest.mark.slow
def test_by_keyboard_alone_a_prompt_is_sent_streams_and_is_stopped(view: Open, served: Server) -> None:
    page = view(extra={"max_tokens": 2000, "ignore_eos": True})
    page.keyboard.type("What is 2 + 2?")  # the prompt has the focus
    page.keyboard.press("Enter")
    body = page.locator(".turn.model .prose")
    until(page, "document.querySelectorAll('.turn.model [data-token]').length > 5")
    before = body.inner_text()
    until(
        page,
        "length => document.querySelector('.turn.model .prose').innerText.length > length",
        arg=len(before) + 5,
    )
    page.keyboard.press("Escape")
    page.locator("#send").wait_for()
    meta = page.locator(".turn.model .meta").inner_text()
    assert re.search(r"\d+ tokens · [\d.]+ tokens/s · first after \d+\.\d\d s", meta), meta
    assert "stopped" in meta
    served.wait_until(lambda: served.metric("num_requests_running") == 0)
    page.keyboard.type("again")  # it has the focus again
    assert page.locator("#prompt").input_value() == "again"


@pytest.mark.slow
def test_each_token_tells_its_experts_by_mouse_by_arrow_and_by_slider(view: Open, shots: Path) -> None:
    page = view(extra=force("one two three four"))
    ask(page, "What is 2 + 2?")
    wait_for_end(page)
    token = page.locator(".turn.model [data-token]").nth(3)
    token.hover()
    page.locator("#experts .layers tbody tr").nth(1).wait_for()
    assert page.locator("#experts .layers tbody tr").count() == 2  # the layers of the tiny V3 that route
    chips = page.locator("#experts .layers tbody tr").first.locator(".chip").all_inner_texts()
    assert len(chips) == 3
    assert all(re.fullmatch(r"\d+ \d\.\d\d", chip) for chip in chips), chips
    assert token.evaluate("node => node.classList.contains('picked')")
    spelled = page.locator("#experts .where code").inner_text()
    assert json.loads(f'"{spelled}"') == token.text_content()
    page.screenshot(path=shots / "desktop.png")
    page.locator(".turn.model .prose").focus()
    page.keyboard.press("ArrowRight")
    until(
        page,
        "before => document.querySelector('.picked').dataset.token != before",
        arg=token.get_attribute("data-token"),
    )
    slider = page.get_by_role("slider", name="Token")
    slider.focus()
    page.keyboard.press("Home")
    until(page, "document.querySelector('#experts .where').innerText.includes('prompt token 1')")
    assert "layer 1: experts" in (slider.get_attribute("aria-valuetext") or "")
    page.locator("#tint").select_option("0")
    page.locator(".tinted [data-hue]").first.wait_for()


@pytest.mark.slow
def test_the_map_is_what_the_api_tells(view: Open, served: Server) -> None:
    """Hovered weights are those of the server's own record of the same text."""
    page = view(extra={"temperature": 0, "max_tokens": 12, "ignore_eos": True})
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "What is 2 + 2?")
    wait_for_end(page)
    body = {**json.loads(sent.value.post_data or ""), "temperature": 0, "max_tokens": 12, "ignore_eos": True}
    whole = served.ask(
        "POST", "/v1/chat/completions", json={**body, "stream": False, "stream_options": None}
    ).json()
    told = whole["choices"][0]["routed_experts"]
    experts = np.frombuffer(base64.b64decode(told["experts"]), "<i2").reshape(told["shape"])
    weights = np.frombuffer(base64.b64decode(told["weights"]), "<f2").reshape(told["shape"])
    slider = page.get_by_role("slider", name="Token")
    for position in (0, len(experts) // 2, len(experts) - 1):
        slider.fill(str(position))
        until(
            page,
            "place => document.querySelector('#experts .where').innerText.includes(`token ${place}`)",
            arg=position + 1,
        )
        rows = page.locator("#experts .layers tbody tr")
        for layer in range(told["shape"][1]):
            shown = rows.nth(layer).locator(".chip").all_inner_texts()
            assert shown == [
                f"{expert} {float(weight):.2f}"
                for expert, weight in zip(experts[position, layer], weights[position, layer], strict=True)
            ]


@pytest.mark.slow
def test_hostile_text_stays_text(view: Open) -> None:
    page = view(extra=force(HOSTILE))
    ask(page, HOSTILE)
    wait_for_end(page)
    assert page.locator(".turn.model .prose").inner_text() == HOSTILE
    assert page.locator(".turn.user .said").inner_text() == HOSTILE
    assert page.locator(".turns img, .turns script, .turns a").count() == 0
    assert page.title() != "taken"


@pytest.mark.slow
def test_code_thinking_and_lists_are_laid_out(view: Open, shots: Path) -> None:
    text = (
        "<think>\nFirst this.</think>Here:\n\n```python\ndef add(a, b):\n    return a + b  # <b>\n```\n\n"
        "- **one**\n- `two`\n\n| a | b |\n|---|---|\n| 1 | 2 |"
    )
    page = view(extra=force(text))
    ask(page, "Write add.")
    wait_for_end(page)
    fold = page.locator("details.thinking")
    assert not fold.evaluate("node => node.open")
    assert not fold.locator(".prose").is_visible()
    fold.locator("summary").focus()
    page.keyboard.press("Enter")
    assert fold.locator(".prose").inner_text() == "First this."
    assert "Thought for" in fold.locator("summary").inner_text()
    assert page.locator("pre code").inner_text() == "def add(a, b):\n    return a + b  # <b>\n"
    assert page.locator(".prose li strong").inner_text() == "one"
    assert page.locator(".prose td").all_inner_texts() == ["1", "2"]
    page.screenshot(path=shots / "code.png")


@pytest.mark.slow
def test_a_tool_call_is_shown_and_its_result_given_back(view: Open) -> None:
    page = view(extra=force(CALL))
    page.locator("#open-settings").click()
    page.get_by_label("Tools, as JSON").fill(json.dumps(TOOLS))
    page.locator("#settings-done").click()
    ask(page, "The weather in Ulm?")
    wait_for_end(page)
    assert json.loads(page.locator(".call pre").inner_text()) == {"town": "Ulm"}
    page.get_by_label("What weather returns").fill("rain")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_role("button", name="Give back").click()
    messages = json.loads(sent.value.post_data or "")["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    assert messages[1]["tool_calls"][0]["id"] == messages[2]["tool_call_id"]
    assert messages[2]["content"] == "rain"
    page.locator(".turn.model").nth(1).locator(".call").wait_for()
    page.locator("#send").wait_for()


@pytest.mark.slow
def test_two_prompts_run_side_by_side(view: Open, shots: Path) -> None:
    page = view(extra={"max_tokens": 24, "ignore_eos": True}, color_scheme="dark")
    page.get_by_role("button", name="Side by side").click()
    page.get_by_label("Prompt A").fill("def add(a, b):")
    page.get_by_label("Prompt B").fill("Once upon a time")
    page.keyboard.press("Enter")
    wait_for_end(page)
    assert page.locator(".thread .turn.model").count() == 2
    assert page.locator("#experts canvas").count() == 2
    until(
        page,
        "/A and B have \\d+% of their choices in common/.test(document.querySelector('.common').innerText)",
    )
    page.screenshot(path=shots / "side-by-side-dark.png")


@pytest.mark.slow
def test_a_wrong_setting_is_said_and_the_prompt_kept(view: Open) -> None:
    page = view(extra={"n": 999}, refused=True)
    page.locator("#prompt").fill("Hello")
    page.keyboard.press("Enter")
    assert "n is 999" in page.get_by_role("alert").filter(has_text="999").inner_text()
    assert page.locator("#prompt").input_value() == "Hello"


@pytest.mark.slow
def test_tabs_by_keyboard_show_load_and_plan(view: Open, shots: Path) -> None:
    page = view(extra={"max_tokens": 64, "ignore_eos": True})
    ask(page, "Some load")
    wait_for_end(page)
    page.get_by_role("tab", name="Chat").focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("tab", name="Load").get_attribute("aria-selected") == "true"
    until(page, "/at most [1-9]/.test(document.querySelector('#load .card').innerText)")
    assert "requests of" in page.locator("#load pre").inner_text()
    until(page, "/last \\d+ s/.test(document.querySelector('#load .map figcaption').innerText)")
    page.screenshot(path=shots / "load.png")
    page.keyboard.press("End")
    page.locator("#plan .verdict").wait_for()
    assert page.locator("#chat").is_hidden()
    page.get_by_label("GPU").select_option("h100")
    until(page, "document.querySelector('#plan .verdict').innerText.includes('h100')")
    page.screenshot(path=shots / "plan.png")


WIDER = """() => [...document.querySelectorAll(
  'html, body, main, header, [role=tabpanel], #scroll, #experts, #composer')]
  .filter((node) => node.checkVisibility() && node.scrollWidth > node.clientWidth + 1)
  .map((node) => node.id || node.tagName)"""
PHONE = {
    "viewport": {"width": 360, "height": 740},
    "has_touch": True,
    "is_mobile": True,
    "device_scale_factor": 2,
}


@pytest.mark.slow
def test_a_phone_scrolls_down_only(view: Open, shots: Path) -> None:
    page = view(extra=force("x" * 80 + "\n\n```\n" + "y" * 90 + "\n```\n\n" + "word " * 12), **PHONE)
    ask(page, "z" * 60)
    wait_for_end(page)
    page.locator("#show-experts").tap()
    for tab in ("Chat", "Load", "Plan"):
        page.get_by_role("tab", name=tab).tap()
        if tab == "Plan":
            page.locator(".verdict").wait_for()
        wide = page.evaluate(WIDER)
        assert wide == [], tab
        page.screenshot(path=shots / f"phone-{tab.lower()}.png")
    page.get_by_role("tab", name="Chat").tap()
    box = page.locator("#send").bounding_box()
    assert box is not None
    assert box["x"] + box["width"] <= 360


CONTRAST = """() => {
  const paint = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = (color) => {
    paint.clearRect(0, 0, 1, 1); paint.fillStyle = color; paint.fillRect(0, 0, 1, 1);
    return [...paint.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b]
    .map((v) => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, at) => sum + v * [.2126, .7152, .0722][at], 0);
  const over = (top, below) => below.map((v, at) => top[at] * top[3] / 255 + v * (1 - top[3] / 255));
  const ground = (node) => node
    ? over(rgba(getComputedStyle(node).backgroundColor), ground(node.parentElement)) : [255, 255, 255];
  const poor = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !node.checkVisibility()) continue;
    if (node.closest('.unseen, .skip, option, canvas')) continue;
    const [text, below] = [rgba(getComputedStyle(node).color), ground(node)].map((each) => light(each));
    const ratio = (Math.max(text, below) + .05) / (Math.min(text, below) + .05);
    if (ratio < 4.5) poor.push(`${ratio.toFixed(2)} ${node.tagName}.${node.className}: ${node.innerText}`);
  }
  return poor;
}"""
NAMED = {
    "button",
    "textbox",
    "combobox",
    "slider",
    "spinbutton",
    "tab",
    "tabpanel",
    "image",
    "dialog",
    "form",
    "group",
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.slow
def test_every_control_has_a_name_and_every_text_contrast(view: Open, scheme: Any) -> None:
    page = view(extra=force("<think>\nhm</think>a `b` **c**\n\n> d\n\n```\ne\n```"), color_scheme=scheme)
    ask(page, "What is 2 + 2?")
    wait_for_end(page)
    page.locator("summary").first.click()
    page.locator(".turn.model [data-token]").nth(2).hover()
    session = page.context.new_cdp_session(page)

    def check(where: str) -> None:
        page.wait_for_timeout(150)  # let what fades or is drawn with the next frame be there
        assert page.evaluate(CONTRAST) == [], (where, scheme)
        nodes = session.send("Accessibility.getFullAXTree")["nodes"]
        nameless = [
            node["role"]["value"]
            for node in nodes
            if not node["ignored"]
            and node["role"]["value"] in NAMED
            and not node.get("name", {}).get("value")
        ]
        assert nameless == [], where
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map((node) => node.id)")
        assert len(ids) == len(set(ids))

    check("chat")
    page.locator("#tint").select_option("1")
    check("tinted")
    page.locator("#open-settings").click()
    check("settings")
    page.keyboard.press("Escape")
    for tab, there in (("Load", "#load .card strong"), ("Plan", "#plan .verdict")):
        page.get_by_role("tab", name=tab).click()
        page.locator(there).first.wait_for()
        check(tab)
