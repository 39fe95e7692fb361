"""Which tokenizer reads a store, and which of its tokens are of no text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from analysis.config import AnalysisSettings
from analysis.latents.step import write_latents
from extract.config import ModelConfig
from extract.errors import BadInput
from tests import tiny
from tests.analysis.latents.test_latents import (
    MODELS,
    NUM_DOCUMENTS,
    PLANTED,
    TEXTS,
    crosscoder_for,
    planted_activations,
    stored,
)


def study(root: Path, texts: list[str] = TEXTS) -> AnalysisSettings:
    crosscoder_for(PLANTED).save(root / "crosscoder")
    return stored(root, planted_activations(), texts)


def test_control_tokens_within_plain_text_are_the_templates(tmp_path: Path) -> None:
    """Those without a role of their own too, such as <|end|>, which is each document's token 3 here."""
    settings = study(tmp_path, [f"{i:02d}<|end|>text" for i in range(NUM_DOCUMENTS)])
    write_latents(settings, tmp_path / "crosscoder", tmp_path / "analysis")
    fires = planted_activations()[:, 1:, 1, 1] > 0.5
    share = float(fires[:, 2].sum() / fires.sum())
    found = pq.read_table(tmp_path / "analysis" / "latents.parquet")["share_template"].to_pylist()[1]
    assert 0 < share < 1 and found == pytest.approx(share)


@pytest.mark.parametrize("change", ["vocabulary", "template"])
def test_tokens_of_another_tokenizer(tmp_path: Path, change: str) -> None:
    settings = study(tmp_path)
    tiny.tokenizer(chat=change != "template", extra="new" if change == "vocabulary" else None).save_pretrained(tmp_path)
    others = replace(settings, models={model: ModelConfig(id=str(tmp_path)) for model in MODELS})
    said = f"tokens was made with another tokenizer .*base={tmp_path}, tuned={tmp_path}.*store=PATH"
    with pytest.raises(BadInput, match=said):
        write_latents(others, tmp_path / "crosscoder", tmp_path / "analysis")
    assert not (tmp_path / "analysis").exists()
