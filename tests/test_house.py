"""The house's own laws, those that no tool of `./check` holds: what loads, what is named how, what is locked.

The floors are import-linter's (pyproject.toml), style is ruff's, types are pyright's. Here stand the laws
that need a running interpreter or a look at every file at once.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))
FILES = SOURCES + [
    path
    for folder in ("tests", "benchmarks", "experiments")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def test_config_loads_without_torch() -> None:
    program = """
import importlib, pkgutil, sys
import shoal.config
for module in pkgutil.walk_packages(shoal.config.__path__, "shoal.config."):
    importlib.import_module(module.name)
    print(module.name)
heavy = {"torch", "numpy", "transformers"} & set(sys.modules)
assert not heavy, f"config is data and loads in milliseconds; it loaded {heavy}"
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "shoal.config.model" in run.stdout.split()


def test_every_file_opens_with_a_header() -> None:
    def header_lines(path: Path) -> int:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        return 0 if ast.get_docstring(tree) is None else (tree.body[0].end_lineno or 0)

    def fits(path: Path) -> bool:
        if path.name == "__init__.py":  # empty, or a list of its face: it argues nothing
            return True
        if path.is_relative_to(ROOT / "tests"):  # its laws are its functions' names
            return header_lines(path) >= 1
        kernel = path.parent.name == "triton"  # it adds its equation, its layout and the argument for them
        return 3 <= header_lines(path) <= (40 if kernel else 15)

    wrong = {str(path.relative_to(ROOT)): header_lines(path) for path in FILES if not fits(path)}
    assert not wrong, f"a file opens with a docstring of 3 to 15 lines; these have: {wrong}"


def test_every_room_is_a_package() -> None:
    """import-linter does not see a folder without __init__.py: its imports would be held by no contract."""
    bare = {path.parent for path in SOURCES if not (path.parent / "__init__.py").exists()} - {ROOT / "src"}
    assert not bare


def test_no_drawers() -> None:
    drawers = {"utils", "util", "common", "helpers", "misc"}
    found = [path for path in FILES if drawers & {*path.relative_to(ROOT).parts, path.stem}]
    assert not found, f"a helper lives with its one user, then becomes a noun with a file of its own: {found}"


def test_nothing_asks_an_object_what_it_is() -> None:
    found = [str(path) for path in SOURCES if re.search(r"\bhasattr\(", path.read_text(encoding="utf-8"))]
    assert not found, f"behaviour changes by passing another part in, not by hasattr: {found}"


def test_the_lock_is_public_and_in_step() -> None:
    text = (ROOT / "uv.lock").read_text(encoding="utf-8")
    assert set(re.findall(r"https?://([^/\"]+)", text)) == {"pypi.org", "files.pythonhosted.org"}

    packages = {package["name"]: package for package in tomllib.loads(text)["package"]}
    assert packages["torch"]["version"].startswith("2.11."), (
        "the documents' figures are measured on torch 2.11"
    )

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    named = {
        "": project["project"]["dependencies"],
        "dev": project["dependency-groups"]["dev"],
        **project["project"]["optional-dependencies"],
    }
    metadata = packages["shoal"]["metadata"]
    locked: dict[str, set[tuple[str, str]]] = {group: set() for group in named}
    for group, rows in {"": metadata["requires-dist"], **metadata["requires-dev"]}.items():
        for row in rows:
            extra = re.fullmatch(r"extra == '(\w+)'", row.get("marker", ""))
            kept = Requirement(row["name"] + row.get("specifier", ""))
            locked[extra[1] if extra else group].add((kept.name, str(kept.specifier)))
    for group, lines in named.items():
        requirements = [Requirement(line) for line in lines]
        assert {(r.name.replace("_", "-"), str(r.specifier)) for r in requirements} == locked[group], (
            f"pyproject.toml and uv.lock differ in {group or 'dependencies'}; run scripts/uv lock"
        )
