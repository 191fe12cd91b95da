"""What each step kept and dropped: counts, bytes and examples, as JSON and as one page with pictures.

The page needs nothing beside it: no script, no font, no file; the pictures are SVG, written here. The law:
examples are the first of each reason in reading order, so the page is the same for the same text. Text of
documents is escaped: a page about web text must not run it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

from shoal.data.read import QUOTED, Document

EXAMPLES, EXAMPLE_CHARACTERS = 3, 400


@dataclass(frozen=True)
class StepReport:
    """One step. `reasons`, `languages` and `lengths` (of kept text, powers of two): documents, bytes."""

    step: str
    documents_in: int
    documents_out: int
    bytes_in: int
    bytes_out: int
    bad_records: int
    quotes: list[str]
    reasons: dict[str, tuple[int, int]]
    languages: dict[str, tuple[int, int]]
    lengths: dict[str, tuple[int, int]]
    examples: dict[str, list[dict[str, str]]]  # by reason; "" is of those kept
    details: dict[str, Any]


@dataclass
class Tally:
    """A report in the making, of a part or of all of them."""

    totals: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    reasons: dict[str, tuple[int, int]] = field(default_factory=dict)
    languages: dict[str, tuple[int, int]] = field(default_factory=dict)
    lengths: dict[int, tuple[int, int]] = field(default_factory=dict)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    bad: int = 0
    quotes: list[str] = field(default_factory=list)

    def add(self, document: Document, text: str, reason: str, language: str, note: str) -> None:
        """`text` is what was kept of the document; with a reason, nothing."""
        size = len(document.text.encode())
        left = 0 if reason else len(text.encode())
        for place, amount in enumerate((1, not reason, size, left)):
            self.totals[place] += amount
        if reason:
            _count(self.reasons, reason, 1, size)
        else:
            _count(self.lengths, (left - 1).bit_length(), 1, left)
            if left < size:
                _count(self.reasons, "parts of kept documents", 1, size - left)
        if language and not reason:
            _count(self.languages, language, 1, left)
        shown = self.examples.setdefault(reason, [])
        if len(shown) < EXAMPLES:
            head = document.text[:EXAMPLE_CHARACTERS]
            shown.append({"source": document.source, "text": head, "note": note})

    def follow(self, other: Tally) -> None:
        """Add what was told of the text after this one's."""
        self.totals = [one + more for one, more in zip(self.totals, other.totals, strict=True)]
        for mine, others in (
            (self.reasons, other.reasons),
            (self.languages, other.languages),
            (self.lengths, other.lengths),
        ):
            for key, (documents, size) in others.items():
                _count(mine, key, documents, size)
        for reason, shown in other.examples.items():
            mine = self.examples.setdefault(reason, [])
            mine += shown[: EXAMPLES - len(mine)]
        self.bad += other.bad
        self.quotes += other.quotes[: QUOTED - len(self.quotes)]

    def save(self) -> bytes:
        return json.dumps(asdict(self), ensure_ascii=False).encode()

    @classmethod
    def load(cls, saved: bytes) -> Tally:
        fields = json.loads(saved)
        return cls(**fields | {"lengths": {int(power): count for power, count in fields["lengths"].items()}})

    def report(self, step: str, details: Mapping[str, object]) -> StepReport:
        documents_in, documents_out, bytes_in, bytes_out = self.totals
        return StepReport(
            step,
            documents_in,
            documents_out,
            bytes_in,
            bytes_out,
            self.bad,
            self.quotes,
            dict(sorted(self.reasons.items(), key=lambda item: (-item[1][1], item[0]))),
            dict(sorted(self.languages.items())),
            {_size(1 << power): count for power, count in sorted(self.lengths.items())},
            dict(sorted(self.examples.items())),
            dict(details),
        )


def _count(table: dict[Any, tuple[int, int]], key: Any, more: int, size: int) -> None:
    documents, total = table.get(key, (0, 0))
    table[key] = (documents + more, total + size)


def page(reports: Sequence[StepReport]) -> str:
    """HTML of all steps, in the order given."""
    if not reports:
        raise ValueError("there is no step to report on; give the folders that the steps wrote")
    start = reports[0]
    funnel = [("before", start.documents_in, start.bytes_in)]
    funnel += [(report.step, report.documents_out, report.bytes_out) for report in reports]
    body = "".join(map(_section, reports))
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>What the text went through</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; margin: .5rem 0; }} td {{ padding: .1rem .8rem .1rem 0; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; }}
pre {{ border-left: 3px solid #888; padding-left: .8rem; }}
svg text {{ font: 12px system-ui, sans-serif; fill: currentColor; }} summary {{ cursor: pointer; }}
</style>
<h1>What the text went through</h1>
<p>{start.documents_in:,} documents, {_size(start.bytes_in)} became {reports[-1].documents_out:,} documents,
{_size(reports[-1].bytes_out)} ({_share(reports[-1].bytes_out, start.bytes_in)}).</p>
{_bars([(name, size, f"{_size(size)} in {documents:,}") for name, documents, size in funnel])}
{body}</html>
"""


def _section(report: StepReport) -> str:
    reasons = [(name, size, f"{_size(size)} in {count:,}") for name, (count, size) in report.reasons.items()]
    lengths = [(f"to {name}", count, f"{count:,}") for name, (count, _) in report.lengths.items()]
    languages = [
        (name, size, f"{_size(size)} in {count:,}") for name, (count, size) in report.languages.items()
    ]
    count = f"{report.documents_out:,} of {report.documents_in:,} documents"
    size = f"{_size(report.bytes_out)} of {_size(report.bytes_in)}"
    share = _share(report.bytes_out, report.bytes_in)
    parts = [
        f"<h2>{escape(report.step)}</h2><p>Kept {count}, {size} ({share}).",
        f"<h3>Dropped, by reason</h3>{_bars(reasons)}" if reasons else "<p>Nothing was dropped.</p>",
        f"<h3>Kept, by language</h3>{_bars(languages)}" if languages else "",
        f"<h3>Kept documents, by length</h3>{_bars(lengths)}" if lengths else "",
        "<h3>Examples</h3>",
        *(_examples(reason, shown) for reason, shown in report.examples.items()),
    ]
    if report.bad_records:
        quotes = "".join(f"<li>{escape(quote)}</li>" for quote in report.quotes)
        parts.append(f"<h3>{report.bad_records:,} records could not be read</h3><ul>{quotes}</ul>")
    rows = "".join(f"<tr><td>{escape(key)}<td>{escape(str(value))}" for key, value in report.details.items())
    parts.append(f"<details><summary>Settings and counts</summary><table>{rows}</table></details>")
    return "\n".join(parts)


def _examples(reason: str, shown: Sequence[Mapping[str, str]]) -> str:
    texts = "".join(
        f"<p>{escape(each['source'])} {escape(each['note'])}</p><pre>{escape(each['text'])}</pre>"
        for each in shown
    )
    return f"<details><summary>{escape(reason) or 'kept'}</summary>{texts}</details>"


def _bars(rows: Sequence[tuple[str, int, str]]) -> str:
    """A bar a row: its name, its length, what is written beside it."""
    most = max((value for _, value, _ in rows), default=0) or 1
    drawn = "".join(
        f'<text x="170" y="{22 * n + 15}" text-anchor="end">{escape(name)}</text>'
        f'<rect x="180" y="{22 * n + 3}" width="{440 * value / most:.1f}" height="16" fill="#4c78a8"/>'
        f'<text x="{186 + 440 * value / most:.1f}" y="{22 * n + 15}">{escape(label)}</text>'
        for n, (name, value, label) in enumerate(rows)
    )
    return f'<svg role="img" viewBox="0 0 800 {22 * len(rows) + 4}" width="100%">{drawn}</svg>'


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "nothing"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
