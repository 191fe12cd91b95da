"""A routing report: one HTML file with its pictures inside, and the same figures as JSON.

The file asks nothing of the network, fits a phone, works by keyboard, and every picture has its words. The
token view is the text itself: a token, touched or focused, shows which experts took it in each layer, with
their weights. All that comes from texts and file names is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import json
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import Tensor

from shoal.analysis import routing_pictures as pictures
from shoal.analysis.observe import Observation, divergence, specialists, together

STRONGEST = 8  # pairs of a layer, specialists of a domain


@dataclass(frozen=True, eq=False)
class Inspection:
    """What there is to report of a model."""

    model: str
    blocks: tuple[int, ...]  # those that route
    top_k: int
    seen: tuple[Observation, ...]  # a domain each
    pieces: tuple[tuple[str, ...], ...]  # the text of each token of their samples
    similar_LEE: Tensor

    @property
    def tokens(self) -> int:
        return sum(one.tokens for one in self.seen)

    @property
    def load_LE(self) -> Tensor:
        return torch.stack([one.load_LE for one in self.seen]).sum(0)

    @property
    def pairs_LEE(self) -> Tensor:
        return torch.stack([one.pairs_LEE for one in self.seen]).sum(0)

    @property
    def watching(self) -> float:
        """Share of the run's time that watching took."""
        return sum(one.watching for one in self.seen) / sum(one.seconds for one in self.seen)


def to_json(found: Inspection) -> dict[str, Any]:
    """The keys are documented in docs/json.md."""
    special = specialists(torch.stack([one.load_LE for one in found.seen]))
    away_LEE = found.similar_LEE.clone()
    away_LEE.diagonal(dim1=1, dim2=2).fill_(-2)
    experts = found.load_LE.shape[1]
    return {
        "model": found.model,
        "blocks": list(found.blocks),
        "experts": experts,
        "top_k": found.top_k,
        "tokens": found.tokens,
        "load": {str(block): row for block, row in zip(found.blocks, found.load_LE.tolist(), strict=True)},
        "divergence": divergence(torch.stack([one.load_LE for one in found.seen])).tolist(),
        "together": [_strongest(pairs_EE, found.tokens) for pairs_EE in found.pairs_LEE],
        "similarity": [
            {"mean": ((square.sum() - experts) / max(1, experts * (experts - 1))).item(), "max": top}
            for square, top in zip(found.similar_LEE, away_LEE.flatten(1).amax(1).tolist(), strict=True)
        ],
        "watching": found.watching,
        "domains": {
            one.name: {
                "tokens": one.tokens,
                "bits_per_byte": one.bits_per_byte,
                "load": one.load_LE.tolist(),
                "weight": one.weight_LE.tolist(),
                "max_violation": one.max_violation_L.tolist(),
                "score_entropy": one.entropy_L.tolist(),
                "load_entropy": one.load_entropy_L.tolist(),
                "experts_for_half": one.experts_for(0.5).tolist(),
                "experts_for_four_fifths": one.experts_for(0.8).tolist(),
                "routed_norm": _numbers(one.norms_L2[:, 0]),
                "shared_norm": _numbers(one.norms_L2[:, 1]),
                "specialists": [
                    [found.blocks[layer], expert, lift] for layer, expert, lift in rows[:STRONGEST]
                ],
            }
            for one, rows in zip(found.seen, special, strict=True)
        },
    }


def to_html(found: Inspection) -> str:
    """The page, whole."""
    told, layers = to_json(found), [str(block) for block in found.blocks]
    shown = [
        ("Where the tokens go", pictures.loads(found.seen, layers)),
        ("Balance and specialisation", pictures.balance(found.seen, layers)),
        ("Chosen together", pictures.pairs(found.pairs_LEE, found.tokens, layers)),
        ("Alike in their weights", pictures.likeness(found.similar_LEE, layers)),
        ("Routed and shared", pictures.norms(found.seen, layers)),
    ]
    body = [
        f"<h1>Experts of {html.escape(found.model)}</h1>",
        f"<p>{len(layers)} layers route, {told['experts']} experts each, {found.top_k} a token; "
        f"{found.tokens:,} tokens read. Watching took {found.watching:.1%} of the run.</p>",
        _summary(told),
        *(_figure(title, *picture) for title, picture in shown),
        "<h2>Token by token</h2><p>Touch a token, or reach it with Tab, to see its experts. Colours are "
        "those of the first choice in the layer.</p>",
        _controls(layers),
        *(_tokens(found, number) for number in range(len(found.seen))),
    ]
    return _PAGE.format(
        title=html.escape(found.model), body="\n".join(body), data=_data(found), script=_SCRIPT
    )


def _strongest(pairs_EE: Tensor, tokens: int) -> list[list[float]]:
    """[one, other, ratio] of the pairs chosen together most oftener than apart, of those seen 10 times."""
    ratio_EE = together(pairs_EE, tokens).nan_to_num(0).triu(1) * (pairs_EE >= 10)
    values, places = ratio_EE.flatten().topk(min(STRONGEST, ratio_EE.numel()))
    experts = pairs_EE.shape[0]
    return [
        [place // experts, place % experts, value]
        for value, place in zip(values.tolist(), places.tolist(), strict=True)
        if value > 0
    ]


def _numbers(values: Tensor) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]


def _summary(told: dict[str, Any]) -> str:
    heads = (
        "domain",
        "tokens",
        "bits a byte",
        "MaxVio",
        "experts for half",
        "its specialists (layer.expert, lift)",
    )
    rows = []
    for name, one in told["domains"].items():
        special = ", ".join(f"{layer}.{expert} {lift:.1f}x" for layer, expert, lift in one["specialists"])
        mean = [sum(one[key]) / len(one[key]) for key in ("max_violation", "experts_for_half")]
        cells = (
            name,
            f"{one['tokens']:,}",
            f"{one['bits_per_byte']:.3f}",
            f"{mean[0]:.2f}",
            f"{mean[1]:.1f}",
            special or "none",
        )
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _figure(title: str, figure: Any, words: str) -> str:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    data = base64.b64encode(buffer.getvalue()).decode()
    words = html.escape(words)
    return (
        f"<h2>{html.escape(title)}</h2><figure><img alt='{words}' src='data:image/png;base64,{data}'>"
        f"<figcaption>{words}</figcaption></figure>"
    )


def _controls(layers: list[str]) -> str:
    options = "".join(f'<option value="{number}">{layer}</option>' for number, layer in enumerate(layers))
    return (
        f'<p><label>Layer of the colours <select id="layer">{options}</select></label></p>'
        '<div id="told" role="status" aria-live="polite">No token chosen.</div>'
    )


def _tokens(found: Inspection, domain: int) -> str:
    spans = "".join(
        f'<button class="token" data-at="{domain},{number}" data-text="{html.escape(piece)}">'
        f"{html.escape(_visible(piece))}</button>{'<br>' if piece.endswith(BREAKS) else ''}"
        for number, piece in enumerate(found.pieces[domain])
    )
    return f'<h3>{html.escape(found.seen[domain].name)}</h3><div class="text">{spans}</div>'


BREAKS = ("\n", "\r")


def _visible(piece: str) -> str:
    """A token in one line: its line breaks as signs, the break itself comes after it."""
    return piece.replace("\r", "").replace("\n", "⏎").replace("\t", "⇥") or "\N{NO-BREAK SPACE}"


def _data(found: Inspection) -> str:
    """The records of the samples, safe inside a script element."""
    samples = [
        {
            "experts": one.sample.experts_NLK.tolist(),
            "weights": [
                [[round(weight, 3) for weight in row] for row in token]
                for token in one.sample.weights_NLK.tolist()
            ],
        }
        for one in found.seen
    ]
    experts = found.load_LE.shape[1]
    told = {"blocks": found.blocks, "count": experts, "samples": samples}
    return json.dumps(told, separators=(",", ":")).replace("<", "\\u003c")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Experts of {title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 62rem; margin: 0 auto;
  padding: 1rem; }}
img {{ max-width: 100%; height: auto; }} figure {{ margin: 0; }}
figcaption {{ color: #52606d; font-size: .9rem; }}
.wide {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-size: .9rem; }}
th, td {{ text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #d9dee4; vertical-align: top; }}
.text {{ line-height: 2; overflow-wrap: anywhere; }}
.token {{ font: inherit; border: 0; border-radius: .2rem; padding: 0 .1rem; margin: 0; white-space: pre;
  color: inherit; cursor: pointer; }}
@media (max-width: 45rem) {{ figure {{ overflow-x: auto; }} figure img {{ max-width: none; width: 45rem; }}
  figcaption {{ position: sticky; left: 0; max-width: 92vw; }} }}
.token:focus {{ outline: 2px solid #2563eb; }}
#told {{ position: sticky; top: 0; background: #fff; border: 1px solid #d9dee4; border-radius: .3rem;
  padding: .5rem; max-height: 40vh; overflow: auto; font-size: .9rem; }}
</style></head><body>
{body}
<script id="data" type="application/json">{data}</script>
<script>{script}</script>
</body></html>
"""

_SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const told = document.getElementById("told"), layer = document.getElementById("layer");
const tokens = [...document.querySelectorAll(".token")];
const at = token => token.dataset.at.split(",").map(Number);
function colour() {
  for (const token of tokens) {
    const [domain, number] = at(token), first = data.samples[domain].experts[number][layer.value][0];
    token.style.background = first < 0 ? "none" : `hsl(${360 * first / data.count} 80% 85%)`;
  }
}
function show(token) {
  const [domain, number] = at(token), one = data.samples[domain];
  told.textContent = "";
  const head = document.createElement("strong");
  head.textContent = JSON.stringify(token.dataset.text);
  told.append(head);
  one.experts[number].forEach((chosen, n) => {
    const line = document.createElement("div");
    line.textContent = `layer ${data.blocks[n]}: ` + chosen.map((expert, k) =>
      expert < 0 ? "dropped" : `${expert} (${one.weights[number][n][k]})`).join(", ");
    told.append(line);
  });
}
for (const token of tokens) {
  token.addEventListener("focus", () => show(token));
  token.addEventListener("click", () => show(token));
  token.addEventListener("mouseenter", () => show(token));
}
layer.addEventListener("change", colour);
colour();
"""
