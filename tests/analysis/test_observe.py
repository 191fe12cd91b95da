"""Laws of watching: what is counted is what was chosen, and the model does not notice."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from benchmarks import watching
from shoal.analysis import observe, report
from shoal.analysis.experts import bits_per_byte, routed
from shoal.analysis.routing import expert_load
from shoal.model.moe import LocalDispatcher, MoE
from tests.analysis.test_experts import batch, build


@pytest.fixture(scope="module")
def seen() -> tuple[observe.Observation, observe.Observation]:
    model = build("deepseek-v3")
    lengths = ((61, 40), (33,))
    one, two = (
        observe.observe(model, f"text {n}", map(batch, each), 100, sample=16)
        for n, each in enumerate(lengths)
    )
    return one, two


def test_counts_are_the_routers_own(seen: tuple[observe.Observation, ...]) -> None:
    model, one = build("deepseek-v3"), seen[0]
    batches = [batch(61), batch(40)]
    assert torch.equal(one.load_LE, expert_load(model, batches))
    assert model.config.moe is not None
    top_k = model.config.moe.num_experts_per_tok
    assert one.tokens == 101
    assert (one.load_LE.sum(1) == 101 * top_k).all()
    # A token of K choices makes K x K pairs, each with itself among them.
    assert (one.pairs_LEE.sum((1, 2)) == 101 * top_k**2).all()
    assert torch.equal(one.pairs_LEE, one.pairs_LEE.transpose(1, 2))
    # Float32 log-probabilities, added up in another order.
    assert one.bits_per_byte == pytest.approx(bits_per_byte(model, batches, 100), rel=1e-6)
    routing = model(batches[0]).routing
    for layer, record in enumerate(routing):
        assert torch.equal(one.sample.experts_NLK[:, layer], record.experts_TK[:16])
    total = sum(model(each).routing[0].weights_TK.double().sum().item() for each in batches)
    # The weights are float32, and made once with gradients, once without.
    assert one.weight_LE[0].sum().item() == pytest.approx(total, rel=1e-6)


def test_the_model_is_left_as_it_was(seen: tuple[observe.Observation, ...]) -> None:
    model, one = build("deepseek-v3").train(), batch()
    before = model.state_dict()["lm_head.weight"].clone()
    observe.observe(model, "text", [one], 100)
    assert model.training
    assert torch.equal(model.state_dict()["lm_head.weight"], before)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(
        type(module.dispatcher) is LocalDispatcher for module in model.modules() if isinstance(module, MoE)
    )


def test_norms_are_of_what_the_experts_put_out(seen: tuple[observe.Observation, ...]) -> None:
    assert seen[0].norms_L2.shape == (seen[0].load_LE.shape[0], 2)
    assert (seen[0].norms_L2 > 0).all()
    bare = observe.observe(build("mixtral-8x7b"), "text", [batch()], 100)
    assert bare.norms_L2[:, 1].isnan().all(), "Mixtral shares no expert"


def test_the_benchmark_of_watching_compares_the_same_reading() -> None:
    model = build("deepseek-v3")
    batches = watching.read(model, 70, 32)
    assert [batch.num_tokens for batch in batches] == [32, 32, 6]
    result = watching.measure(model, batches, rounds=2)
    assert result.plain > 0
    assert 0 < result.told < 1
    assert result.overhead > -1


def test_entropy_divergence_and_skew_have_their_ends() -> None:
    even, one = torch.ones(1, 8), torch.eye(8)[:1]
    assert observe.entropy(even).item() == pytest.approx(3.0)
    assert observe.entropy(one).item() == pytest.approx(0.0, abs=1e-6)
    alike, apart = torch.stack([even, even]), torch.stack([torch.eye(8)[:1], torch.eye(8)[1:2]])
    assert observe.divergence(alike).item() == pytest.approx(0.0, abs=1e-6)
    assert observe.divergence(apart).item() == pytest.approx(1.0)
    assert observe.specialists(alike) == [[], []]
    assert observe.specialists(apart) == [[(0, 0, 2.0)], [(0, 1, 2.0)]]


def test_together_is_one_where_choices_are_independent() -> None:
    """100 tokens, two experts that each take half of them, both a quarter."""
    pairs = torch.tensor([[50, 25], [25, 50]])
    ratio = observe.together(pairs, 100)
    assert ratio[0, 1].item() == 1.0
    assert math.isnan(ratio[0, 0].item())


def test_similarity_is_one_for_copies_and_of_all_their_weights() -> None:
    model = build("deepseek-v3")
    layer = routed(model.config)[0]
    experts = model.model.layers[layer].get_submodule("mlp.experts")
    stacks = [parameter for _, parameter in experts.named_parameters()]
    with torch.no_grad():
        for stack in stacks:
            stack[1] = stack[0]
    similar = observe.similarity(model)[0]
    flat = torch.cat([stack.flatten(1) for stack in stacks], 1)
    expected = torch.nn.functional.cosine_similarity(flat.unsqueeze(0), flat.unsqueeze(1), dim=-1)
    # Sums of some 10^4 products in float32.
    torch.testing.assert_close(similar, expected, atol=1e-5, rtol=0)
    assert similar[0, 1].item() == pytest.approx(1.0, abs=1e-5)


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_is_whole_and_alone(seen: tuple[observe.Observation, ...]) -> None:
    """Nothing is fetched, every picture has words, and a hostile text stays text."""
    model = build("deepseek-v3")
    assert model.config.moe is not None
    hostile = replace(seen[0], name="<b>&")
    found = report.Inspection(
        model="</script><script>alert(1)</script>",
        blocks=routed(model.config),
        top_k=model.config.moe.num_experts_per_tok,
        seen=(hostile, seen[1]),
        pieces=tuple(("<img src=x>", *("a" for _ in range(15))) for _ in seen),
        similar_LEE=observe.similarity(model),
    )
    text = report.to_html(found)
    page = Page()
    page.feed(text)
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 5
    assert all((each["src"] or "").startswith("data:image/png;base64,") for each in pictures)
    assert all(len(each["alt"] or "") > 40 for each in pictures)
    assert not [a for tag, a in page.tags if tag in ("link", "iframe") or (tag == "script" and "src" in a)]
    assert "http" not in text.replace(report._SCRIPT, "")
    assert "alert(1)</script>" not in text
    assert sum(tag == "button" for tag, _ in page.tags) == 32
    assert any(attributes.get("name") == "viewport" for _, attributes in page.tags)
    told = json.loads(json.dumps(report.to_json(found)))
    assert told["tokens"] == 134
    assert told["domains"]["<b>&"]["load"] == hostile.load_LE.tolist()
    total = torch.tensor(list(told["load"].values()))
    assert torch.equal(total, seen[0].load_LE + seen[1].load_LE)
