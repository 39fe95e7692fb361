"""The progress of extraction as metrics: of all workers, by one of them, the same run whoever keeps it."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path

import pytest

from extract.activations import extract
from extract.claims import Claims
from extract.command import compose
from extract.config import ExtractSettings
from extract.mirror import FAILED, STOPPED
from extract.progress import ProgressLog, TokensLog, metrics_of, status_of
from extract.status import Progress
from extract.tokens import make_tokens
from tests.wandb_files import isolate, offline_parts
from train.metric_table import METRICS, metric_of


def lines_of(settings: ExtractSettings, name: str = "extraction") -> list[dict]:
    path = Path(settings.outputs) / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_entries_are_added_up():
    """`base` at two hookpoints, one of them finished; `tuned` not begun. The first shard starts the watch of speed."""
    entries = [
        Progress("base", "block1", [(1000.0, 60), (1010.0, 40)], 0, 2, 100, True),
        Progress("base", "block2", [(1010.0, 60)], 1, 2, 100, False),
        Progress("tuned", "block1", [], 0, 2, 100, False),
    ]
    assert metrics_of(entries, now=1050.0) == {
        "extract/tokens": 160,
        "extract/shards": 3,
        "extract/tokens_per_second": (40 + 60) / 50,
        "extract/claimed": 1,
        "extract/done/base": 0.8,
        "extract/done/tuned": 0.0,
    }


def test_extraction_logs_from_the_first_to_the_last_shard(study: list[str]):
    settings = compose(ExtractSettings, study)
    tokens = make_tokens(settings)
    extract(settings)
    lines = lines_of(settings)
    num_shards = 2 * len(tokens.shard_documents())
    assert lines[-1]["step"] == lines[-1]["extract/shards"] == num_shards
    assert lines[-1]["extract/tokens"] == 2 * tokens.num_tokens and lines[-1]["extract/done/tuned"] == 1
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    names = {metric_of(name) for line in lines for name in line.keys() - {"step"}}
    assert names == {metric for metric in METRICS if metric.section == "extract"}
    extract(settings)  # nothing is missing, and nothing is logged again
    assert lines_of(settings) == lines and not list(settings.claims_folder.rglob("*.claim"))


def test_making_tokens_is_logged_document_by_document(study: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("extract.progress.EVERY_S", 0.0)
    settings = compose(ExtractSettings, study)
    tokens = make_tokens(settings)
    lines = lines_of(settings, "tokens")
    lengths = [len(tokens.document(i).token_ids) for i in range(tokens.num_documents)]
    assert [line["step"] for line in lines] == [line["tokens/tokens"] for line in lines] == [*accumulate(lengths)]
    assert [line["tokens/documents"] for line in lines] == [*range(1, tokens.num_documents + 1)]
    assert {metric_of(name) for name in lines[0].keys() - {"step"}} == {m for m in METRICS if m.section == "tokens"}
    make_tokens(settings)
    assert lines_of(settings, "tokens") == lines, "nothing was made"


def test_tokens_of_a_shard_that_was_lost_are_logged_again(study: list[str]):
    """A first process died at 30 tokens, of which 20 were in finished shards."""
    settings = compose(ExtractSettings, study)
    with TokensLog(settings, 0) as log:
        for count in (1, 2, 3):
            log.finished(count, 10 * count)
    with TokensLog(settings, 20) as log:
        log.finished(2, 20)
        log.finished(3, 35)
    assert [line["step"] for line in lines_of(settings, "tokens")] == [10, 20, 35]


def test_a_log_that_cannot_be_written_is_a_warning(study: list[str], caplog: pytest.LogCaptureFixture):
    settings = compose(ExtractSettings, study)
    Path(settings.outputs).mkdir(exist_ok=True)
    (Path(settings.outputs) / "tokens").write_text("a file where the folder should be")
    make_tokens(settings)
    assert "The progress of making tokens cannot be logged" in caplog.text


def test_one_worker_at_a_time_keeps_the_log(study: list[str]):
    settings = compose(ExtractSettings, study)
    tokens = make_tokens(settings)
    with Claims(settings.claims_folder, 300) as theirs, Claims(settings.claims_folder, 300) as ours:
        first, second = ProgressLog(settings, tokens, theirs), ProgressLog(settings, tokens, ours)
        with first:
            first.note()
            second.note()
            assert second._opened is None and [line["step"] for line in lines_of(settings)] == [0]
    with Claims(settings.claims_folder, 300) as ours, ProgressLog(settings, tokens, ours) as second:
        second.note()
        assert second._opened is not None
    assert [line["step"] for line in lines_of(settings)] == [0]


@pytest.mark.parametrize(("ended_by", "expected"), [(None, 0), (KeyboardInterrupt, STOPPED), (OSError, FAILED)])
def test_work_that_was_interrupted_is_not_failed(ended_by: type[BaseException] | None, expected: int):
    """A signal of Slurm's becomes KeyboardInterrupt, and the requeued job goes on with the same W&B run."""
    assert status_of(ended_by, 0) == expected


@pytest.mark.slow
def test_extraction_is_a_run_of_its_own(study: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    isolate(monkeypatch, tmp_path)
    limits = ["tracking.start_timeout_s=300", "tracking.end_timeout_s=300"]
    settings = compose(ExtractSettings, [*study, "tracking.mode=offline", "tracking.group=a group", *limits])
    tokens = make_tokens(settings)
    extract(settings)
    (part,) = offline_parts(Path(settings.outputs) / "extraction")
    assert [row["step"] for row in part.history] == [line["step"] for line in lines_of(settings)]
    assert part.history[-1]["extract/tokens"] == 2 * tokens.num_tokens and part.exit_code == 0
    assert (part.run["job_type"], part.run["run_group"]) == ("extract", "a group")
    assert part.config["manifests"] == {"tokens": tokens.manifest.content_sha256()}
