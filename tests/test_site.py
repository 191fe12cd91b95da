"""The documentation site builds, with every warning an error, and its reference says what the code says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.config.families import FAMILIES

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quiet, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_reference_is_of_the_code(site: Path) -> None:
    commands = (site / "reference" / "commands" / "index.html").read_text("utf-8")
    for verb in (
        "shoal quickstart",
        "shoal experts place",
        "shoal bench serve",
        "shoal plan",
        "shoal convert",
    ):
        assert f">{verb}<" in commands
    assert "--gguf" in commands
    families = (site / "reference" / "families" / "index.html").read_text("utf-8")
    assert all(f"<code>{name}</code>" in families for name in FAMILIES)
    recipes = (site / "reference" / "recipes" / "index.html").read_text("utf-8")
    for key in ("tokens_per_batch", "bias_update_speed", "esft", "in_backward"):
        assert f"<code>{key}</code>" in recipes
    metrics = (site / "reference" / "metrics" / "index.html").read_text("utf-8")
    for name in (
        "shoal:time_to_first_token_seconds",
        "shoal:expert_tokens_total",
        "shoal:kv_cache_usage_perc",
    ):
        assert f"<code>{name}</code>" in metrics


def test_nothing_is_fetched_from_another_machine(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        assert 'src="http' not in text, page
        assert not re.search(r'<link[^>]*(?:stylesheet|preconnect)[^>]*href="http', text), page
