"""The page of `shoal inspect` in a real Chromium: nothing fetched or cut off, tokens tell their experts."""

from __future__ import annotations

import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.analysis import observe, report
from shoal.analysis.experts import routed
from tests.analysis.test_experts import batch, build

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")


def test_the_page_works_wide_and_on_a_phone(tmp_path: Path) -> None:
    pytest.importorskip("playwright.sync_api", reason="needs playwright")
    playwright: Any = import_module("playwright.sync_api")
    model = build("deepseek-v3")
    seen = (observe.observe(model, "text", [batch(33)], 100, sample=16),)
    assert model.config.moe is not None
    pieces = tuple('a<b"\n' if number % 4 == 0 else f"word{number}" for number in range(16))
    found = report.Inspection(
        model="tiny",
        blocks=routed(model.config),
        top_k=model.config.moe.num_experts_per_tok,
        seen=seen,
        pieces=(pieces,),
        similar_LEE=observe.similarity(model),
    )
    page_file = tmp_path / "experts.html"
    page_file.write_text(report.to_html(found), encoding="utf-8")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, width in (("wide", 1200), ("phone", 390)):
            page, faults = browser.new_page(viewport={"width": width, "height": 844}), []
            page.on("console", lambda message, faults=faults: faults.append(message.text))
            page.on("pageerror", lambda error, faults=faults: faults.append(str(error)))
            page.on("request", lambda asked, faults=faults: faults.append(asked.url))
            page.goto(page_file.as_uri())
            fetched = [fault for fault in faults if not fault.startswith(("file:", "data:"))]
            assert not fetched
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
            heights = page.evaluate(
                "[...document.querySelectorAll('.token')].map(token => token.offsetHeight)"
            )
            assert max(heights) == min(heights), "a line break makes no token taller"
            page.focus("#layer")
            page.keyboard.press("Tab")  # to the first token
            told = page.inner_text("#told")
            assert r'"a<b\"\n"' in told
            first = torch.as_tensor(seen[0].sample.experts_NLK)[0, 0, 0].item()
            assert f"layer {found.blocks[0]}: {first} (" in told
            page.screenshot(path=tmp_path / f"{name}.png", full_page=True)
        browser.close()
