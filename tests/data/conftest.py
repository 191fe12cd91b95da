"""What the tests of this room share: real text, a tokenizer trained on it, and the published data where it is
there.

Everything is real: modules of the standard library, DeepSeek's own vocabulary, vectors and chat templates.
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import settings

from shoal.data.jobs import quiet, run_here
from shoal.data.read import Document, standard_library
from shoal.data.report import StepReport
from shoal.data.text import Tokenizer
from shoal.data.tokenizer import train_tokenizer
from tests.data.corpus import Corpus, make_corpus, run_all

# These laws are about results; how long an example takes is the business of a machine and its other users.
settings.register_profile("results", deadline=None)
settings.load_profile("results")


@pytest.fixture(scope="session")
def modules() -> list[Document]:
    """About 1 MB of code."""
    return list(islice(standard_library(), 60))


@pytest.fixture(scope="session")
def tokenizer(modules: list[Document]) -> Tokenizer:
    return train_tokenizer((module.text for module in modules), vocab_size=1000)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def cleaned(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[StepReport]]:
    """All steps on the corpus, by this process alone."""
    folder = tmp_path_factory.mktemp("cleaned")
    return folder, run_all(corpus, folder, partial(run_here, workers=1, progress=quiet))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no published data at {folder}")
    return folder
