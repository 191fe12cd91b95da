"""The pages of the site that are made from code as it is built: commands, families, recipes, metrics.

mkdocs calls these functions (mkdocs.yml, hooks). The law: a page under reference/ says nothing that the code
does not, so none of it is written by hand. Links that leave docs/, in files that are read on their own too,
are turned to where the site has them.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.core import TyperGroup
from typer.main import get_command

ROOT = Path(__file__).parent.parent
OUTSIDE = {"deploy/grafana.json": "deploy/grafana.json", "LOG.md": "log.md"}  # copied into the site as
DECISIONS = "decisions"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The decisions, in order, whichever there are."""
    for section in config.nav or ():
        if "Decisions" in section:
            section["Decisions"] = [
                f"{DECISIONS}/{path.name}" for path in sorted((ROOT / "docs" / DECISIONS).glob("*.md"))
            ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {"commands": commands, "families": families, "recipes": recipes, "metrics": metrics}
    for name, make in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content="\n".join(make()) + "\n"))
    for source, place in OUTSIDE.items():
        text = (ROOT / source).read_text("utf-8")
        text = re.sub(r"\]\((?!https?:)[^)]*\)", "]", text) if source.endswith(".md") else text
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links from docs/ to the rest of the repository, as links within the site."""
    up = "../" * page.file.src_uri.count("/")
    for source, place in OUTSIDE.items():
        markdown = markdown.replace(f"]({up}../{source})", f"]({up}{place})")
    return markdown


def commands() -> Iterator[str]:
    """Every verb with its help, as the command line itself knows it."""
    from shoal.cli.app import app

    yield "# Commands\n\nEvery command takes `--help`. A mistake is one line and exit code 2."
    yield from _command("shoal", get_command(app))


def _command(name: str, command: Any) -> Iterator[str]:
    if isinstance(command, TyperGroup):
        for verb, inner in sorted(command.commands.items()):
            yield from _command(f"{name} {verb}", inner)
        if not command.invoke_without_command:
            return
    yield f"\n## {name}\n\n{_plain(command.help)}\n"
    rows = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
    if rows:
        yield "| | default | |\n|---|---|---|"
    for parameter in rows:
        if parameter.param_type_name == "argument":
            spelled = (parameter.metavar or parameter.name).upper()
        else:
            spelled = ", ".join([*parameter.opts, *parameter.secondary_opts])
        default = parameter.default
        shown = "" if default in (None, (), False) or callable(default) else f"`{_cell(str(default))}`"
        shown = "required" if parameter.required else shown
        yield f"| `{spelled}` | {shown} | {_cell(_plain(getattr(parameter, 'help', '')))} |"


def families() -> Iterator[str]:
    """The table of config/families.py, with what config/cost.py counts."""
    from shoal.config import cost
    from shoal.config.families import FAMILIES

    yield "# Families\n\nParameters without prediction modules, the cache of a token in bfloat16.\n"
    yield "| name | dialect | parameters | active | printed | layers | experts | cache, KB | source |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, row in FAMILIES.items():
        config, counted = row.config, cost.params(row.config, mtp=False)
        moe = config.moe
        experts = "" if moe is None else f"{moe.num_experts_per_tok} of {moe.n_routed_experts}"
        printed = "" if row.total is None else row.total.text
        if row.active is not None:
            printed += f", {row.active.text} active"
        cells = (
            f"`{name}`",
            config.model_type,
            f"{counted.total / 1e9:.2f}B",
            f"{counted.active / 1e9:.2f}B",
        )
        cache = f"{cost.kv_bytes_per_token(config) / 1e3:.1f}"
        cells += (printed, str(config.num_hidden_layers), experts, cache, row.source)
        yield f"| {' | '.join(cells)} |"


def recipes() -> Iterator[str]:
    """Every key of every kind of recipe, with type, default and what its class says of it."""
    from shoal.config.extend import ExtendConfig
    from shoal.config.run import RunConfig
    from shoal.config.tune import GRPOConfig, SFTConfig

    yield "# Recipes\n\nTOML; keys are changed by `--set a.b=c`; an unknown one fails with the nearest name."
    verbs = {"train": RunConfig, "sft": SFTConfig, "grpo": GRPOConfig, "extend": ExtendConfig}
    told: set[type] = set()
    for verb, kind in verbs.items():
        yield f"\n## shoal {verb}"
        yield from _keys(kind, "", told)


def _keys(kind: type, where: str, told: set[type]) -> Iterator[str]:
    name = f"`[{where}]`" if where else "top level"
    if kind in told:
        yield f"\n### {name}: {kind.__name__}\n\nAs above."
        return
    told.add(kind)
    yield f"\n### {name}: {kind.__name__}\n\n{_plain(inspect.getdoc(kind))}\n"
    yield "| key | type | default |\n|---|---|---|"
    hints, inner = get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        parts = [hint, *getattr(hint, "__args__", ())]
        inner += [(part, field.name) for part in parts if dataclasses.is_dataclass(part)]
        default = "required" if field.default is dataclasses.MISSING else f"`{_cell(repr(field.default))}`"
        if field.default_factory is not dataclasses.MISSING or dataclasses.is_dataclass(field.default):
            default = ""
        shown = hint.__name__ if isinstance(hint, type) else str(hint)
        shown = re.sub(r"\b(?:typing|shoal\.[a-z_.]+)\.", "", shown)
        yield f"| `{field.name}` | `{_cell(shown)}` | {default} |"
    for part, field_name in inner:
        yield from _keys(part, f"{where}.{field_name}".lstrip("."), told)


def metrics() -> Iterator[str]:
    """Each family that the server's own collectors give, asked of an engine that has reported once."""
    import torch

    from shoal.engine.stats import Stats
    from shoal.server.metrics import Metrics
    from shoal.server.worker import plain

    some = torch.ones(1, 1, dtype=torch.int64)
    stats = Stats(0, 0, 1, 1, drafted=(1,), accepted=(1,), expert_tokens=some, experts_touched=some[0])
    info = SimpleNamespace(num_pages=1, page_size=64)
    process: Any = SimpleNamespace(state="ready", deaths=0, info=info, stats=plain(stats), past_stats={})
    yield "# Metrics\n\nOf `GET /metrics`, in Prometheus's text format.\n"
    yield "| name | type | what | labels |\n|---|---|---|---|"
    for family in sorted(Metrics(process).registry.collect(), key=lambda family: family.name):
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        labels = labels or sorted(getattr(family, "_labelnames", ()))
        what = _cell(family.documentation)
        yield f"| `{family.name}{suffix}` | {family.type} | {what} | {', '.join(labels)} |"


def _plain(text: str | None) -> str:
    return "\n".join(line.strip() for line in (text or "").strip().splitlines())


def _cell(text: str) -> str:
    return (
        " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
        if "`" not in text
        else text.replace("|", "/")
    )
