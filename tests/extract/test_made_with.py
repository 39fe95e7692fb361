"""A folder of shards has one kind of settings, whoever starts when."""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

from extract import activations, made_with
from extract.activations import ModelShards, extract
from extract.archive import is_finished, read_index
from extract.batches import compute_shard
from extract.claims import Claims, Holder
from extract.command import compose
from extract.config import ExtractSettings
from extract.errors import BadInput
from extract.made_with import check_folder, settings_sha256, start_folder
from extract.models import load_blocks
from extract.publish import publish, publish_first
from extract.repair import repair
from extract.shards import finish_activations
from extract.stores import TokenStore
from extract.tokens import make_tokens
from extract.verify import problems
from tests.extract.test_activations import run


def test_of_many_that_publish_first_exactly_one_does(tmp_path: Path):
    with ThreadPoolExecutor(8) as threads:
        for i in range(20):
            path, barrier = tmp_path / f"{i}.json", threading.Barrier(8)

            def begin(own: int, path: Path = path, barrier: threading.Barrier = barrier) -> bool:
                barrier.wait()
                return publish_first(path, str(own).encode())

            (winner,) = [own for own, first in enumerate(threads.map(begin, range(8))) if first]
            assert path.read_bytes() == str(winner).encode()
    assert len(list(tmp_path.iterdir())) == 20  # nothing is left beside them


def test_a_file_system_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*paths: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    assert publish_first(tmp_path / "settings.json", b"{}")
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_who_loses_the_race_to_begin_a_folder_sees_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def just_after_another(path: Path, data: bytes) -> bool:
        publish(path, b'{"codec": "fp8"}')
        return publish_first(path, data)

    monkeypatch.setattr(made_with, "publish_first", just_after_another)
    with pytest.raises(BadInput, match="codec: 'fp8' there, 'int8' now"):
        start_folder(tmp_path / "one", {"codec": "int8"})
    start_folder(tmp_path / "two", {"codec": "fp8"})


def test_settings_are_not_replaced_while_others_are_at_work(tmp_path: Path):
    start_folder(tmp_path, {"codec": "fp8"})
    with pytest.raises(BadInput, match="codec: 'fp8' there, 'int8' now"):
        start_folder(tmp_path, {"codec": "int8"}, others_at_work=True)
    start_folder(tmp_path, {"codec": "int8"})
    check_folder(tmp_path, {"codec": "int8"})


def test_the_digest_is_that_of_what_counts():
    """Order and nulls do not: a setting that a later release adds is null in what was made before."""
    plain = hashlib.sha256(b'{"a": [1, {"b": "x"}], "c": {}}').hexdigest()
    assert settings_sha256({"c": {"new": None}, "a": (1, {"b": "x", "later": None})}) == plain
    assert settings_sha256({"c": {}, "a": [1, {"b": "y"}]}) != plain


Begin = Callable[[list[str]], ModelShards]


@pytest.fixture
def begin(study: list[str]) -> Iterator[Begin]:
    """Makes a worker of the base model, begun with more settings than the study's."""
    make_tokens(compose(ExtractSettings, study))

    def begun(more: list[str]) -> ModelShards:
        settings = compose(ExtractSettings, [*study, *more])
        shards = ModelShards(settings, TokenStore(settings.tokens_folder), "base")
        with Claims(settings.claims_folder, 60) as claims:
            shards.start(claims)
        return shards

    yield begun


def write(shards: ModelShards, number: int) -> None:
    """Compute and publish one shard, as `compute` does."""
    model = load_blocks("base", shards.settings.models["base"], shards.hookpoints)
    documents = [shards.tokens.document(i).token_ids for i in shards.documents[number]]
    shard = compute_shard(model, documents, shards.settings.activations.batch_tokens, lambda tokens: None)
    with Claims(shards.settings.claims_folder, 60) as claims:
        claim = claims.take(f"base/shard-{number:05d}")
        assert claim
        shards._write(claims, claim, number, shard)


def test_a_worker_whose_settings_were_replaced_stops_and_publishes_nothing(begin: Begin):
    first = begin([])
    second = begin(["activations.codec=fp8"])
    folder = first.settings.activations_folder("base", "block1")
    with pytest.raises(BadInput, match="codec: 'fp8' there, 'bf16' now"):
        write(first, 0)  # it had begun to compute before
    with Claims(first.settings.claims_folder, 60) as claims, pytest.raises(BadInput, match="codec: 'fp8' there"):
        first.compute(claims, lambda: pytest.fail("loaded a model"), lambda: None)
    assert [path.name for path in folder.iterdir()] == ["settings.json"]
    write(second, 0)
    assert len(list(folder.iterdir())) == 3


def test_shards_of_other_settings_are_never_taken_over_or_made_again(begin: Begin):
    """The one order of events that no look at settings.json can see: it is replaced just when a shard is published."""
    first = begin([])
    write(first, 1)
    folder = first.settings.activations_folder("base", "block1")
    before = {path.name: path.read_bytes() for path in folder.glob("shard-*")}
    (folder / "settings.json").unlink()
    second = begin(["activations.codec=fp8"])
    message = r"shard-00001.tar was made with other settings than .*settings.json states.*repair=true make them again"
    with Claims(second.settings.claims_folder, 60) as claims, pytest.raises(BadInput, match=message):
        second.compute(claims, lambda: pytest.fail("loaded a model"), lambda: None)
    with pytest.raises(BadInput, match=message):
        finish_activations(folder, second.tokens, json.loads((folder / "settings.json").read_bytes()))
    assert {path.name: path.read_bytes() for path in folder.glob("shard-*")} == before
    named = [str(problem) for problem in problems(second.settings) if problem.path.parent == folder]
    assert len(named) == 2 and "shard-00001.index says that its shard was made with other settings" in named[1]
    list(repair(second.settings, list(problems(second.settings))))
    assert not list(problems(second.settings))


def test_a_second_command_with_other_settings_is_refused_while_one_is_at_work(study: list[str], begin: Begin):
    """The first has not finished a shard yet, but holds a claim."""
    settings = begin([]).settings
    claim = settings.claims_folder / "base/shard-00000.claim"
    claim.parent.mkdir(parents=True, exist_ok=True)
    claim.write_text(json.dumps(asdict(Holder("another-host", 1, time.time()))))
    with pytest.raises(BadInput, match="codec: 'bf16' there, 'fp8' now"):
        extract(compose(ExtractSettings, [*study, "activations.codec=fp8"]))
    claim.unlink()
    extract(compose(ExtractSettings, [*study, "activations.codec=fp8"]))


def test_every_activation_index_says_what_its_shard_was_made_with(study: list[str]):
    settings = run(study)
    folder = settings.activations_folder("tuned", "block1")
    digest = settings_sha256(json.loads((folder / "settings.json").read_bytes()))
    found = [read_index(path)["made_with_sha256"] for path in folder.glob("*.index")]
    assert found == [digest] * 4
    index = json.loads((settings.tokens_folder / "shard-00000.index").read_bytes())
    assert "made_with_sha256" not in index


def test_shards_of_earlier_releases_which_do_not_say_are_kept(study: list[str]):
    settings = run(study)
    folder = settings.activations_folder("base", "block1")
    for path in folder.glob("*.index"):
        index = json.loads(path.read_bytes())
        del index["made_with_sha256"]
        path.write_bytes(json.dumps(index).encode())
    (folder / "manifest.json").unlink()
    (folder / "shard-00002.index").unlink()
    written = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    extract(settings)
    assert [path.name for path in folder.glob("*.tar") if path.stat().st_mtime_ns != written[path.name]] == [
        "shard-00002.tar"
    ]
    assert not list(problems(settings))


def test_whether_a_shard_is_finished_is_read_off_the_beginning_of_its_index(tmp_path: Path):
    archive, index = tmp_path / "shard-00000.tar", tmp_path / "shard-00000.index"
    archive.write_bytes(bytes(1024))
    head = {"format_version": 2, "bytes": 1024, "sha256": "0" * 64, "made_with_sha256": "1" * 64}
    index.write_bytes(json.dumps({**head, "documents": []}).encode()[:-1] + b"and never parsed")
    assert is_finished(archive, "1" * 64)
    with pytest.raises(BadInput, match="was made with other settings"):
        is_finished(archive, "2" * 64)
    index.write_bytes(json.dumps({"documents": [["0", 1]] * 100, **head}).encode())  # in another order: read whole
    assert is_finished(archive, "1" * 64)
    archive.write_bytes(bytes(1023))
    assert not is_finished(archive, "1" * 64)
    index.write_bytes(json.dumps({**head, "format_version": 3, "documents": []}).encode())
    with pytest.raises(BadInput, match="format version 3"):
        is_finished(archive, "1" * 64)
    index.write_bytes(b'{"format_version": 2, "by')
    with pytest.raises(BadInput, match="shard-00000.index is missing or damaged"):
        is_finished(archive, "1" * 64)


def test_a_finished_shard_is_looked_at_once(study: list[str], monkeypatch: pytest.MonkeyPatch):
    settings = run(study)
    looked: list[str] = []
    monkeypatch.setattr(
        activations, "is_finished", lambda path, digest: looked.append(str(path)) or is_finished(path, digest)
    )
    extract(settings)
    assert len(looked) == len(set(looked)) == 8  # two models, four shards
