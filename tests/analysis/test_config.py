"""Every cross-check of the section `analysis` names the setting, its value and the remedy."""

import math

import pytest

from analysis.config import AnalysisConfig, AnalysisSettings, check_analysis
from analysis.firings.config import check_groups
from extract.command import compose
from extract.errors import BadInput


def test_the_defaults_are_valid_and_those_of_the_method() -> None:
    config = AnalysisConfig()
    check_analysis(config)
    owner = config.owner
    assert (owner.delta_norm_low, owner.shared_low, owner.shared_high, owner.delta_norm_high) == (0.1, 0.4, 0.6, 0.9)
    assert (owner.max_nu_error, owner.max_nu_reconstruction, owner.max_nu_reconstruction_dedicated) == (0.2, 0.5, 0.75)
    assert config.examples.top_documents == 20 and config.tags.min_f1 == 0.8


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch_tokens", 0, "analysis.batch_tokens"),
        ("examples.top_documents", 0, "analysis.examples.top_documents"),
        ("tags.confidence", 1.0, "analysis.tags.confidence"),
        ("tags.min_f1", 80, "analysis.tags.min_f1"),
        ("compare.resamples", 0, "analysis.compare.resamples"),
        ("compare.confidence", 95.0, "analysis.compare.confidence"),
        ("compare.label_error", 1.5, "analysis.compare.label_error"),
        ("compare.leaderboard", "elo.csv", r"analysis.compare.leaderboard \(elo.csv\) is not a file"),
        ("owner.delta_norm_low", 0.5, "delta_norm_low"),
        ("owner.shared_high", 0.95, "shared_high"),
        ("owner.max_nu_error", 0.0, "analysis.owner.max_nu_error"),
        ("owner.duplicate_cosine", 1.0, "analysis.owner.duplicate_cosine"),
        ("save_minutes", 0.0, "analysis.save_minutes"),
        ("examples.num_quantiles", 0, "analysis.examples.num_quantiles"),
        ("examples.num_silent", -1, "analysis.examples.num_silent"),
        ("intervals.groups", 1, "analysis.intervals.groups"),
        ("intervals.groups", 1000000, "analysis.intervals.groups .* must be at most 1024"),
        ("intervals.seed", -1, "analysis.intervals.seed"),
        ("examples.seed", -1, "analysis.examples.seed"),
        ("nulls.seed", -1, "analysis.nulls.seed"),
        ("examples.seed", 2**63, r"analysis\.examples\.seed .* must lie between 0 and 2\^63 - 1"),
        ("examples.sampled", "some", r"analysis.examples.sampled \(some\) must be"),
        ("owner.max_nu_error", math.nan, "analysis.owner.max_nu_error"),
        ("owner.shared_low", math.nan, "shared_low"),
        ("save_minutes", math.nan, "analysis.save_minutes"),
        ("intervals.confidence", 95.0, "analysis.intervals.confidence"),
        ("nulls.num_latents", 0, "analysis.nulls.num_latents"),
        ("annotate.num_documents", 21, "analysis.examples.top_documents"),
        ("device", "tpu", "analysis.device"),
        ("report.redact", "True", "analysis.report.redact"),
        ("report.max_megabytes", 0.0, "analysis.report.max_megabytes"),
        ("report.max_megabytes", math.nan, "analysis.report.max_megabytes"),
        ("report.max_megabytes", math.inf, "analysis.report.max_megabytes"),
        ("tags.seed", -1, r"analysis\.tags\.seed \(-1\) must not be negative"),
        ("taxonomy.most_categories", 0, r"analysis\.taxonomy\.most_categories \(0\) must be at least 1"),
        ("scoring.seed", -1, r"analysis\.scoring\.seed \(-1\) must not be negative"),
        ("agreement.seed", -1, r"analysis\.agreement\.seed \(-1\) must not be negative"),
    ],
)
def test_a_value_that_cannot_be_used(name: str, value: object, message: str) -> None:
    config = AnalysisConfig()
    *sections, field = name.split(".")
    target = getattr(config, sections[0]) if sections else config
    setattr(target, field, value)
    with pytest.raises(BadInput, match=message) as caught:
        check_analysis(config)
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(("name", "source"), [("positives", "samples_per_quantile"), ("negatives", "num_silent")])
def test_no_more_documents_are_judged_than_are_drawn(name: str, source: str) -> None:
    config = AnalysisConfig()
    setattr(config.scoring, name, 51)
    check_analysis(config)  # nothing is judged
    config.scoring.judge = "m"
    with pytest.raises(BadInput, match=rf"analysis\.scoring\.{name} \(51\) .* \(50\).* analysis\.examples\.{source}"):
        check_analysis(config)
    setattr(config.scoring, name, 50)
    check_analysis(config)


@pytest.mark.parametrize("name", ["shared", "other", "dead"])
def test_a_model_is_not_named_like_an_owner(name: str) -> None:
    overrides = ["experiment=pair", "models.base=/somewhere", "models.tuned=/elsewhere", "corpus=/text.jsonl"]
    compose(AnalysisSettings, overrides)
    with pytest.raises(BadInput, match=rf"models\.{name}"):
        compose(AnalysisSettings, [*overrides, f"+models.{name}.id=/third"])


def test_the_command_line_reaches_the_section() -> None:
    overrides = ["experiment=demo/base_simpo", "analysis.tags.name=style", "analysis.owner.max_nu_error=0.3"]
    analysis = compose(AnalysisSettings, overrides).analysis
    assert (analysis.tags.name, analysis.owner.max_nu_error) == ("style", 0.3)
    with pytest.raises(BadInput, match=r"Did you mean analysis\.tags\.min_f1"):
        compose(AnalysisSettings, ["experiment=demo", "analysis.tags.minf1=0.5"])


def test_groups_of_latents_are_numbered_in_32_bits() -> None:
    check_groups(1024, 2**21)
    with pytest.raises(BadInput, match=r"groups \(1024\) times 2,097,153 latents .*at most 1023 groups"):
        check_groups(1024, 2**21 + 1)
