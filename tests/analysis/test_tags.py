"""Evidence on planted scores: F1 and AUROC by hand, halves that keep prompts together, intervals that cover."""

import csv
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.config import AnalysisSettings, TagsConfig
from analysis.examples.maxima import SCHEMA
from analysis.tags import (
    TaggedDocuments,
    auroc_of,
    best_f1_of,
    best_scores,
    choose,
    evidence,
    f1_of,
    percentiles,
    read_documents,
    read_scores,
    resampled_weights,
    write_tags,
)
from extract.config import ModelConfig
from extract.shards import write_tokens
from extract.stores import TokenDocument, TokenStore


def planted_documents(num_prompts: int = 120) -> list[TokenDocument]:
    """Two answers to every prompt; the tuned model's are tagged on every third."""
    documents = []
    for i in range(num_prompts):
        for model in ("base", "tuned"):
            tags = {"answered_by": model} | ({"behaviour": "asks"} if model == "tuned" and i % 3 == 0 else {})
            turns = [{"role": "user", "content": f"prompt {i}"}, {"role": "assistant", "content": f"{model} {i}"}]
            ids = np.arange(4, dtype=np.uint32)
            documents.append(TokenDocument("", f"{model}{i}", "tests", ids, messages=turns, tags=tags))
    return documents


def read(tmp_path: Path, documents: list[TokenDocument], tag: str = "behaviour") -> TaggedDocuments:
    write_tokens(tmp_path, documents)
    return read_documents(TokenStore(tmp_path / "tokens"), tag)


def test_a_prompt_is_never_on_both_sides(tmp_path: Path) -> None:
    found = read(tmp_path, planted_documents())
    assert np.array_equal(found.chooses_n[0::2], found.chooses_n[1::2])
    assert np.array_equal(found.prompt_n[0::2], found.prompt_n[1::2])
    assert len(set(found.prompt_n.tolist())) == 120
    assert 40 < found.chooses_n[0::2].sum() < 80
    assert found.value_n[1::6].tolist() == ["asks"] * 40 and set(found.value_n[0::2].tolist()) == {""}


def test_plain_text_is_its_own_prompt(tmp_path: Path) -> None:
    texts = ["one", "two", "one"]
    ids = np.arange(4, dtype=np.uint32)
    found = read(tmp_path, [TokenDocument("", str(i), "tests", ids, text) for i, text in enumerate(texts)])
    assert found.prompt_n[0] == found.prompt_n[2] != found.prompt_n[1]


def test_a_perfect_latent(tmp_path: Path) -> None:
    documents = read(tmp_path, planted_documents())
    positive = documents.value_n == "asks"
    noise = np.random.default_rng(0).random(len(positive)).astype(np.float32)
    scores = {3: noise, 8: np.where(positive, 2.0 + noise, noise).astype(np.float32)}
    row = evidence(TagsConfig(), "asks", "tuned", scores, documents)
    assert (row.latent, row.f1, row.f1_high, row.auroc, row.auroc_high, row.found) == (8, 1, 1, 1, 1, True)
    assert row.threshold == pytest.approx(1.5, abs=0.1)  # midway between the closest two
    assert row.num_positive == (positive & ~documents.chooses_n).sum()
    assert row.num_positive + row.num_negative == (~documents.chooses_n).sum()


def test_a_noise_latent_is_not_found(tmp_path: Path) -> None:
    documents = read(tmp_path, planted_documents())
    noise = np.random.default_rng(1).random(len(documents.value_n)).astype(np.float32)
    row = evidence(TagsConfig(), "asks", "tuned", {0: noise}, documents)
    assert not row.found and row.f1 < 0.5
    assert row.auroc_low < 0.5 < row.auroc_high
    assert row.f1_low <= row.f1 <= row.f1_high


def test_the_measuring_half_has_no_part_in_the_choice(tmp_path: Path) -> None:
    """A latent that is perfect on the choosing half and blind on the other is chosen, and shown to be worthless."""
    documents = read(tmp_path, planted_documents())
    positive = documents.value_n == "asks"
    overfitted = np.where(positive & documents.chooses_n, 5.0, 0.0)
    honest = np.where(positive, 5.0, np.where(np.arange(len(positive)) % 12 == 0, 5.0, 0.0))
    row = evidence(TagsConfig(), "asks", "tuned", {0: honest, 1: overfitted}, documents)
    assert (row.latent, row.f1, row.auroc, row.found) == (1, 0.0, 0.5, False)


def test_an_owner_without_latents(tmp_path: Path) -> None:
    documents = read(tmp_path, planted_documents())
    row = evidence(TagsConfig(), "asks", "base", {}, documents)
    assert row.latent is None and math.isnan(row.f1) and not row.found and row.num_positive > 0


def test_intervals_resample_prompts_whole() -> None:
    prompt = np.array([0, 0, 1, 1, 1, 2])
    weights = list(resampled_weights(prompt, resamples=200, seed=3))
    for weight in weights:
        assert weight[0] == weight[1] and weight[2] == weight[3] == weight[4]
        assert weight[0] + weight[2] + weight[5] == 3
    assert np.mean(weights) == pytest.approx(1, abs=0.1)
    assert all(np.array_equal(a, b) for a, b in zip(weights, resampled_weights(prompt, 200, 3), strict=True))


def test_the_interval_covers_the_truth() -> None:
    """Scores of positives are N(1, 1), of negatives N(0, 1): the true AUROC is P(N(1, 2) > 0) = 0.7602."""
    generator, covered = np.random.default_rng(4), 0
    for trial in range(40):
        positive = np.arange(160) % 2 == 0
        score = generator.normal(size=160) + positive
        level = score.argsort().argsort()
        resamples = resampled_weights(np.arange(160), resamples=200, seed=trial)
        low, high = percentiles(np.array([auroc_of(level, positive, weight) for weight in resamples]), 0.95)
        covered += low <= 0.7602 <= high
    assert covered >= 33  # 38 expected; fewer than 33 of 40 would have probability 0.001


def test_an_interval_has_a_width_where_every_prompt_says_the_same() -> None:
    """Nine tagged prompts of three documents, ninety untagged ones; the latent fires on two or three of each tagged."""
    prompt = np.repeat(np.arange(99), 3)
    positive, z2 = prompt < 9, 1.959964**2
    value = np.where(positive, "asks", "")
    documents = TaggedDocuments(np.tile(value, 2), np.tile(prompt, 2), np.arange(594) < 297)
    for fires, f1, low in ((3, 1.0, 18 / (18 + z2)), (2, 0.8, 36 / (36 + 9 + 3 * z2))):
        score = np.tile(np.where(positive & (np.arange(297) % 3 < fires), 2.0, 0.0), 2).astype(np.float32)
        row = evidence(TagsConfig(resamples=200), "asks", "simpo", {7: score}, documents)
        assert (row.num_positive_prompts, row.num_negative_prompts, row.num_positive) == (9, 90, 27)
        assert row.f1 == pytest.approx(f1) and row.f1_low == pytest.approx(low, abs=1e-5)
        assert row.f1_high == pytest.approx(1.0 if fires == 3 else (36 + 6 * z2) / (45 + 6 * z2), abs=1e-5)
        # AUROC: of prompts that the latent is silent on, a document draws with all untagged ones.
        auroc = 1.0 if fires == 3 else 2 / 3 + 1 / 6
        assert row.auroc_low == pytest.approx((9 * auroc + z2 / 2) / (9 + z2), abs=1e-5) and row.auroc_high >= auroc


@pytest.mark.parametrize(
    ("score", "positive", "expected"),
    [
        ([4, 3, 2, 1], [1, 1, 0, 0], (1.0, 2.5)),
        ([4, 3, 2, 0], [1, 0, 1, 0], (0.8, 1.0)),  # two of two caught with one mistake: 2 * 2 / (3 + 2)
        ([4, 4, 1, 0], [1, 0, 0, 1], (0.5, 2.5)),  # ties are predicted together; a score of 0 never is: 2 / (2 + 2)
        ([0, 0, 5, 0], [1, 1, 0, 0], (0.0, math.nan)),
        ([0, 0, 0, 0], [1, 1, 0, 0], (0.0, math.nan)),
    ],
)
def test_best_f1_by_hand(score: list[float], positive: list[int], expected: tuple[float, float]) -> None:
    found = best_f1_of(np.array(score, dtype=np.float32), np.array(positive, dtype=bool))
    assert found == pytest.approx(expected, nan_ok=True)


def test_best_f1_equals_trying_every_threshold() -> None:
    generator = np.random.default_rng(6)
    for _ in range(30):
        score = generator.integers(0, 6, size=25).astype(float)
        positive = generator.random(25) < 0.4
        f1, threshold = best_f1_of(score, positive)
        tried = [f1_of(score > level, positive, np.ones(25)) for level in np.arange(0, 6, 0.25)]
        assert f1 == pytest.approx(max(tried)) and f1_of(score > threshold, positive, np.ones(25)) == pytest.approx(f1)


def test_neighbouring_scores_are_told_apart(tmp_path: Path) -> None:
    """Between two neighbours in float32 there is no float32 left, and their middle rounds to one of them."""
    documents = read(tmp_path, planted_documents())
    one, two = np.float32(1), np.float32(2)
    after = np.nextafter(one, two)
    for low, high in ((one, after), (after, np.nextafter(after, two))):
        score_n = np.where(documents.value_n == "asks", high, low)
        row = evidence(TagsConfig(resamples=2), "asks", "tuned", {0: score_n}, documents)
        assert score_n.dtype == np.float32 and row.f1 == 1.0 and row.found


def test_a_tag_of_null_is_no_tag(tmp_path: Path) -> None:
    ids = np.arange(4, dtype=np.uint32)
    tags: list[dict] = [{"behaviour": None}, {"behaviour": "asks"}, {"behaviour": False}, {}]
    found = read(tmp_path, [TokenDocument("", str(i), "s", ids, str(i), tags=each) for i, each in enumerate(tags)])
    assert found.value_n.tolist() == ["", "asks", "False", ""]


def test_choice_prefers_the_lower_latent_on_ties() -> None:
    positive = np.array([True, False])
    assert choose({9: np.array([1.0, 0]), 4: np.array([2.0, 0])}, positive) == (4, 1.0)
    assert choose({}, positive)[0] is None
    assert choose({1: np.array([0.0, 3.0])}, positive)[0] is None


def test_auroc_equals_comparing_all_pairs() -> None:
    generator = np.random.default_rng(2)
    score, positive = generator.integers(0, 5, size=30), generator.random(30) < 0.5
    weight = generator.integers(0, 3, size=30).astype(float)
    pairs = [(i, j, weight[i] * weight[j]) for i in np.flatnonzero(positive) for j in np.flatnonzero(~positive)]
    won = sum(w * ((score[i] > score[j]) + 0.5 * (score[i] == score[j])) for i, j, w in pairs)
    assert auroc_of(score, positive, weight) == pytest.approx(won / sum(w for *_, w in pairs))
    assert math.isnan(auroc_of(score, np.ones(30, dtype=bool), weight))


def analysed(tmp_path: Path, tag: str = "behaviour") -> tuple[AnalysisSettings, Path]:
    """Latent 0 of the tuned model fires on the tagged documents; latent 1 of the base on all answers of the base."""
    documents = planted_documents()
    write_tokens(tmp_path / "store", documents)
    fired = [(0, i, 2.0) for i, d in enumerate(documents) if "behaviour" in d.tags]
    fired += [(1, i, 3.0) for i, d in enumerate(documents) if d.tags["answered_by"] == "base"]
    rows = [dict(zip(SCHEMA.names, row, strict=True)) for row in fired]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), tmp_path / "document_maxima.parquet")
    pq.write_table(pa.table({"latent": [0, 1, 2], "owner": ["tuned", "base", "shared"]}), tmp_path / "latents.parquet")
    models = {name: ModelConfig(id=name) for name in ("base", "tuned")}
    settings = AnalysisSettings(models=models, pairs={"base_tuned": ["base", "tuned"]}, store=str(tmp_path / "store"))
    settings.analysis.tags = TagsConfig(name=tag, resamples=50)
    return settings, tmp_path


def test_one_latent_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Scores of 1,000 latents in 2,000 documents are 8 MB; the best latents of three values are those of `choose`."""
    rng = np.random.default_rng(0)
    latent, document = (part.flatten().astype(np.int32) for part in np.indices((1000, 40)))
    document = (latent * 7 + document * 31) % 2000
    value = rng.random(len(latent)).astype(np.float32)
    table = pa.table([pa.array(latent), pa.array(document), pa.array(value)], SCHEMA)
    pq.write_table(table, tmp_path / "maxima.parquet")
    documents = TaggedDocuments(rng.choice(["", "a", "b", "c"], 2000), np.arange(2000), rng.random(2000) < 0.5)
    tracemalloc.start()
    best = best_scores(read_scores(tmp_path / "maxima.parquet", list(range(1000)), 2000), ["a", "b", "c"], documents)
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()
    chooses = documents.chooses_n
    scores = {j: score[chooses] for j, score in read_scores(tmp_path / "maxima.parquet", list(range(1000)), 2000)}
    for name, found in best.items():
        assert list(found) == [choose(scores, (documents.value_n == name)[chooses])[0]]
    assert len({latent for found in best.values() for latent in found}) == 3


def table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_tags_csv(tmp_path: Path) -> None:
    settings, folder = analysed(tmp_path)
    found = table(write_tags(settings, folder))
    assert [(row["tag"], row["value"], row["owner"]) for row in found] == [
        ("behaviour", "asks", "base"),
        ("behaviour", "asks", "tuned"),
    ]
    assert (found[1]["latent"], found[1]["f1"], found[1]["threshold"], found[1]["found"]) == ("0", "1.0", "1.0", "True")
    assert (found[0]["latent"], found[0]["found"]) == ("", "False")
    assert 0.8 < float(found[1]["f1_low"]) < float(found[1]["f1_high"]) == float(found[1]["auroc_high"]) == 1


def test_a_set_of_models_that_owns_latents_has_a_row(tmp_path: Path) -> None:
    settings, folder = analysed(tmp_path)
    settings.pairs["base_tuned"] = ["base", "tuned", "third"]
    owners = ["tuned+third", "base", "shared"]
    pq.write_table(pa.table({"latent": [0, 1, 2], "owner": owners}), tmp_path / "latents.parquet")
    found = [(row["owner"], row["latent"], row["found"]) for row in table(write_tags(settings, folder))]
    assert [owner for owner, *_ in found] == ["base", "tuned", "third", "tuned+third"]
    assert found[1][1] == found[2][1] == "" and found[3][1:] == ("0", "True")


def test_another_tag_is_attributed_to_its_model(tmp_path: Path) -> None:
    settings, folder = analysed(tmp_path, tag="answered_by")
    found = {(row["value"], row["owner"]): row for row in table(write_tags(settings, folder))}
    assert found["base", "base"]["f1"] == "1.0" and found["base", "tuned"]["latent"] == ""
    assert float(found["tuned", "tuned"]["f1"]) < 0.7  # a third of the tuned answers


def test_without_the_tag_only_the_heading(tmp_path: Path) -> None:
    settings, folder = analysed(tmp_path, tag="absent")
    assert table(write_tags(settings, folder)) == []
    assert (folder / "tags.csv").read_text().startswith("tag,value,owner,latent,threshold,f1,")
