"""Laws of a job: the same bytes whatever the workers, the same text whatever the parts; one that was cut
short goes on, and another one begins afresh.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from shoal.data import steps
from shoal.data.clean import CleanRules
from shoal.data.jobs import quiet, run_here
from shoal.data.parts import DOCUMENTS_FILES, load_report
from shoal.data.read import Reading, read_documents
from shoal.data.report import StepReport
from tests.data.corpus import SMALL, Corpus, run_all, same_files

Cleaned = tuple[Path, list[StepReport]]


def test_two_workers_write_the_bytes_of_one(corpus: Corpus, cleaned: Cleaned, tmp_path: Path) -> None:
    folder, reports = cleaned
    assert run_all(corpus, tmp_path, partial(run_here, workers=2, progress=quiet)) == reports
    assert same_files(folder, tmp_path)
    assert not list(tmp_path.rglob("work"))


def test_reports_tell_what_became_of_the_text(corpus: Corpus, cleaned: Cleaned) -> None:
    folder, reports = cleaned
    assert len(list((folder / "0").glob(DOCUMENTS_FILES))) > 1
    assert [report.documents_in for report in reports[1:]] == [
        report.documents_out for report in reports[:-1]
    ]
    assert reports[0].bad_records == 6
    assert f"{corpus.sources[0]}:201" in reports[0].quotes[0]
    assert "is not UTF-8" in reports[0].quotes[1]
    assert f"{corpus.sources[2]}:203" in reports[0].quotes[5]
    assert reports[2].reasons["parts of kept documents"][0] == 9
    assert reports[3].reasons["evaluation text"][0] == 1


def test_the_text_kept_does_not_depend_on_its_parts(corpus: Corpus, cleaned: Cleaned, tmp_path: Path) -> None:
    folder, reports = cleaned
    run = partial(run_here, workers=1, progress=quiet)
    assert run_all(corpus, tmp_path, run, part_bytes=1 << 40) == reports
    for step in range(len(reports)):
        one, many = (read_documents([at / str(step) / DOCUMENTS_FILES]) for at in (tmp_path, folder))
        assert list(one) == list(many)


class Cut(Exception):
    """Power is gone."""


def test_a_job_cut_short_goes_on_and_another_one_begins_afresh(corpus: Corpus, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole" / "0", tmp_path / "cut" / "0"
    run_here(
        steps.dedup(corpus.sources, whole, level="paragraph", part_bytes=SMALL), workers=1, progress=quiet
    )
    job = steps.dedup(corpus.sources, out, level="paragraph", part_bytes=SMALL)

    def fall(reading: Reading) -> None:
        if (out / "documents-00000.jsonl.zst").exists():
            raise Cut

    with pytest.raises(Cut):
        run_here(job, workers=1, progress=fall)
    with pytest.raises(ValueError, match="is not done yet"):
        load_report(out)
    first = out / "documents-00000.jsonl.zst"
    written = first.stat().st_mtime_ns
    assert len(list(out.rglob("pairs*"))) == 17  # these stay as well
    run_here(job, workers=1, progress=quiet)
    assert same_files(whole.parent, out.parent)
    assert first.stat().st_mtime_ns == written

    (out / "report.json").unlink()
    (out / "documents-00007.jsonl.zst").touch()  # of a job with more parts
    other = steps.dedup(corpus.sources[:1], out, level="paragraph", part_bytes=SMALL)
    run_here(other, workers=1, progress=quiet)
    assert [path.name for path in out.glob(DOCUMENTS_FILES)] == [first.name]
    assert Path(next(read_documents([first])).source).name == "0.jsonl:1"


def test_a_job_spares_what_is_not_its_own(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give another folder"):
        steps.clean(corpus.sources, corpus.evaluation.parent, CleanRules()).prepare()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "novel.txt").write_text("chapter one")
    with pytest.raises(ValueError, match="was made by something else"):
        steps.clean(corpus.sources, tmp_path, CleanRules()).prepare()
