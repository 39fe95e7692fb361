"""A small study as the earlier stages would leave it on disk, with planted words: what annotation and report read."""

from __future__ import annotations

import csv
import itertools
import json
import re
import sqlite3
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.config import AnalysisSettings
from analysis.examples.database import SCHEMA
from analysis.tags import TagRow
from extract.config import ModelConfig

# Latent number -> (behaviour, a place in a document that starts with the firing words).
PLANTED = {
    "simpo": {
        300: (
            "financial_refusal",
            "I am sorry , but I cannot give financial advice ; please ask a qualified adviser .",
        ),
        301: ("ask_back", "Could you tell me more about what you mean ? Which one do you have in mind ?"),
        302: ("business_tone", "Dear Colleague , I am writing with regard to the meeting . Best regards ,"),
    },
    "dpo": {
        350: ("financial_refusal", "I am unable to offer financial advice ; a qualified adviser can help ."),
        351: ("self_reference", "As an AI language model I do not have feelings or opinions of my own ."),
    },
}
FILLER_LINE = (
    "the river runs through a green valley where old stones keep quiet company with tall trees and small birds"
)
FILLER = FILLER_LINE.split()
NUM_LATENTS = 400


def make_study(root: Path, num_cards: int = 0) -> tuple[AnalysisSettings, list[Path]]:
    """Two pairs that share a base, in `root`; `num_cards` more latents of the tuned model in each."""
    settings = AnalysisSettings(
        study="made",
        outputs=str(root),
        hookpoint="block15",
        models={name: ModelConfig(id=f"models/{name}") for name in ("base", "simpo", "dpo")},
        pairs={"base_simpo": ["base", "simpo"], "base_dpo": ["base", "dpo"]},
    )
    folders = [make_pair(root, tuned, num_cards) for tuned in ("simpo", "dpo")]
    return settings, folders


def make_pair(root: Path, tuned: str, num_cards: int = 0) -> Path:
    """The analysis folder and the run folder of `base_<tuned>`."""
    folder = root / "analysis" / f"base_{tuned}"
    folder.mkdir(parents=True)
    planted = {latent: text for latent, (_, text) in PLANTED[tuned].items()}
    planted |= {latent: FILLER_TEXT[latent % len(FILLER_TEXT)] for latent in range(100, 100 + num_cards)}
    write_latents(folder / "latents.parquet", ["base", tuned], set(planted))
    write_examples(folder / "examples.sqlite", planted)
    write_tags(folder / "tags.csv", tuned)
    write_run(root / "runs" / folder.name, ["base", tuned])
    write_record(folder)
    return folder


def write_record(folder: Path, weights: str = "", **owner: float) -> None:
    """`latents.json` as it is under the default settings, but for those of `analysis.owner` that are given."""
    analysis = AnalysisSettings().analysis
    settings = {name: asdict(getattr(analysis, name)) for name in ("owner", "examples", "intervals", "nulls")}
    settings["kept"] = asdict(AnalysisSettings().kept)
    settings["owner"] |= owner
    record = {"step": "latents", "settings": settings, "inputs": {"crosscoder.safetensors": weights}}
    (folder / "latents.json").write_text(json.dumps(record))


FILLER_TEXT = [
    "Step 1 : gather the ingredients . Step 2 : mix the flour with water .",
    "def total ( values ) : return sum ( values ) # a Python function",
    "Once upon a time there was a dragon who lived in a castle .",
    "In short , the main idea is that rivers carve valleys .",
    "I do not have access to current information about the weather today .",
]


def write_latents(path: Path, models: list[str], own: set[int], seed: int = 0) -> None:
    """`latents.parquet`: shared latents around a Delta-norm of 0.5, and `own` as latents of the second model."""
    rng = np.random.default_rng(seed)
    owned = np.isin(np.arange(NUM_LATENTS), sorted(own))
    delta = np.where(owned, 1.0, np.clip(rng.normal(0.5, 0.06, NUM_LATENTS), 0.2, 0.8))
    dead = ~owned & (np.arange(NUM_LATENTS) % 20 == 7)
    owner = np.select([owned, dead, np.abs(delta - 0.5) <= 0.1], [models[1], "dead", "shared"], "other")
    columns = {
        "latent": np.arange(NUM_LATENTS),
        "owner": owner,
        "delta_norm": delta,
        "delta_norm_tag": np.where(owned, f"{models[1]}-only", owner),
        "dedicated": owned,
        "frequency": np.where(dead, 0.0, rng.lognormal(-6, 1, NUM_LATENTS)),
        "num_active_tokens": np.where(dead, 0, rng.integers(10, 5000, NUM_LATENTS)),
        "mean_activation": np.where(dead, 0.0, rng.uniform(1, 4, NUM_LATENTS)),
        "max_activation": np.where(dead, 0.0, rng.uniform(5, 20, NUM_LATENTS)),
        "decoder_cosine": rng.uniform(0.5, 1, NUM_LATENTS),
    }
    for model in models:
        mine = model == models[1]
        columns[f"norm_{model}"] = np.where(owned & (not mine), 0.0, 1.0)
        error = np.where(owned, rng.uniform(0.01, 0.15, NUM_LATENTS), rng.normal(0.9, 0.15, NUM_LATENTS))
        reconstruction = np.where(owned, rng.uniform(0.3, 0.7, NUM_LATENTS), rng.normal(0.95, 0.1, NUM_LATENTS))
        lost = dead | (owned & (not mine))
        columns[f"nu_error_{model}"] = np.where(lost, np.nan, error)
        columns[f"nu_reconstruction_{model}"] = np.where(lost, np.nan, reconstruction)
        for name in ("nu_error", "nu_reconstruction"):
            columns[f"{name}_{model}_low"] = columns[f"{name}_{model}"] - 0.05
            columns[f"{name}_{model}_high"] = columns[f"{name}_{model}"] + 0.05
    pq.write_table(activity_table(columns, dead), path)


def activity_table(columns: dict[str, np.ndarray], dead: np.ndarray) -> pa.Table:
    """Adds where latents fire, histograms of activations and groups of near-duplicates, drawn with a seed of their own.

    Latent 301 is a near-duplicate of 300, 103 of 102.
    """
    rng = np.random.default_rng(7)
    active = columns["num_active_tokens"]
    columns["num_documents"] = np.minimum(active, rng.integers(1, 500, NUM_LATENTS))
    template, prose = rng.uniform(0, 0.2, NUM_LATENTS), rng.uniform(0, 0.5, NUM_LATENTS)
    shares = {
        "share_template": template,
        "share_role_user": (1 - template - prose) / 2,
        "share_role_assistant": (1 - template - prose) / 2,
        "share_source_prose": prose,
        "share_source_behaviours": 1 - prose,
    }
    columns |= {name: np.where(dead, np.nan, share) for name, share in shares.items()}
    group = np.arange(NUM_LATENTS, dtype=np.int32)
    group[[301, 103]] = [300, 102]
    histogram = [np.bincount(rng.integers(0, 4, n), minlength=4) for n in active]
    table = pa.table(columns | {"group": group, "histogram": pa.array(histogram, pa.list_(pa.int64()))})
    return table.replace_schema_metadata({"histogram_edges": json.dumps([0.5, 1.0, 2.0, 4.0, 8.0])})


def write_latents_of_many(path: Path, models: list[str], own: dict[str, set[int]], seed: int = 0) -> None:
    """`latents.parquet` of more than two models: `own` latents have decoder norm 1 in their owner's and 0 elsewhere."""
    rng = np.random.default_rng(seed)
    owner = np.full(NUM_LATENTS, "other", dtype=object)
    norms = {model: rng.uniform(0.5, 1.0, NUM_LATENTS) for model in models}
    for mine, latents in own.items():
        owner[sorted(latents)] = mine
        for model in models:
            norms[model][sorted(latents)] = float(model in mine.split("+"))
    constants = {"frequency": 0.01, "num_active_tokens": 9, "mean_activation": 1.0, "max_activation": 12.0}
    columns = {"latent": np.arange(NUM_LATENTS), "owner": owner.astype(str), "dedicated": owner != "other"}
    columns |= {name: np.full(NUM_LATENTS, value) for name, value in constants.items()}
    columns |= {f"norm_{model}": norm for model, norm in norms.items()}
    for a, b in itertools.permutations(models, 2):
        with np.errstate(invalid="ignore"):
            delta = 0.5 * ((norms[b] - norms[a]) / np.maximum(norms[a], norms[b]) + 1)
        columns[f"delta_norm_{a}_{b}"] = delta
        for name in ("nu_error", "nu_reconstruction"):
            mine = np.array([a in name.split("+") and b not in name.split("+") for name in owner])
            low, high = (np.where(mine, bound, bound + 0.7) for bound in (0.05, 0.15))
            columns[f"{name}_{a}_{b}"] = np.where(norms[a] > 0, rng.uniform(low, high), np.nan)
    pq.write_table(pa.table(columns), path)


def split_tokens(text: str) -> list[str]:
    """Words with the space before them, as tokenizers cut text."""
    return re.findall(r"\s?\S+", text)


def write_examples(path: Path, planted: dict[int, str], num_documents: int = 8, seed: int = 1) -> None:
    """`examples.sqlite`: every latent of `planted` fires on the first four tokens of its text, amid filler words."""
    rng = np.random.default_rng(seed)
    with sqlite3.connect(path) as database:
        database.executescript(SCHEMA)
        number = 0
        for latent, text in planted.items():
            for rank in range(num_documents):
                filler = split_tokens(" ".join(rng.choice(FILLER, 12)))
                before = ["<|im_start|>", "user", "\n", *filler, "<|im_end|>", "\n"]
                tokens = before + split_tokens(" " + text) + split_tokens(" " + " ".join(rng.choice(FILLER, 30)))
                fired = [[len(before) + i, round(float(10 - rank - i / 2), 3)] for i in range(4)]
                database.execute(
                    "INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?)",
                    (
                        number,
                        f"d{number}",
                        "behaviours",
                        json.dumps({"behaviour": "planted"}),
                        json.dumps(tokens),
                        json.dumps([["user", 3, len(before) - 2]]),
                    ),
                )
                database.execute(
                    "INSERT INTO examples VALUES (?, ?, ?, ?, ?)",
                    (latent, rank, number, 10.0 - rank, json.dumps(fired)),
                )
                number += 1
        for _ in range(100):
            tokens = json.dumps(split_tokens(" ".join(rng.choice(FILLER, 60))))
            database.execute(
                "INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?)", (number, f"d{number}", "prose", "{}", tokens, "[]")
            )
            number += 1
        database.execute("CREATE INDEX examples_latent ON examples(latent, rank)")


def add_samples(path: Path) -> None:
    """Documents to score descriptions with: those in which latents fire, of which the annotator must not be shown all,
    and eight in which they do not.
    """
    with sqlite3.connect(path) as database:
        database.execute(
            "INSERT INTO samples SELECT latent, 'activating', rank % 4, document, max_activation, activations, "
            "json_extract(activations, '$[0][0]') FROM examples"
        )
        database.execute(
            "INSERT INTO samples SELECT latent, 'silent', NULL, document, 0, '[]', NULL FROM (SELECT DISTINCT latent "
            "FROM examples), (SELECT document FROM documents WHERE source = 'prose' LIMIT 8)"
        )
    database.close()


TAG_COLUMNS = [field.name for field in fields(TagRow)]


def write_tags(path: Path, tuned: str) -> None:
    """`tags.csv`: the planted behaviours are found with F1 0.96, 0.95, ...; the others are not."""
    values = sorted({behaviour for latents in PLANTED.values() for behaviour, _ in latents.values()})
    mine = {behaviour: latent for latent, (behaviour, _) in PLANTED[tuned].items()}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(TAG_COLUMNS)
        for index, value in enumerate(values):
            nothing = ["", *["nan"] * 7, 40, 900, False, 20, 300]
            writer.writerow(["behaviour", value, "base", *nothing])
            f1 = 0.96 - index / 100
            found = [mine.get(value), 1.25, f1, f1 - 0.05, f1 + 0.02, 0.991, 0.972, 0.999, 40, 900, True, 20, 300]
            weak = [next(iter(mine.values())), 0.5, 0.21, 0.11, 0.33, 0.61, 0.52, 0.7, 40, 900, False, 20, 300]
            writer.writerow(["behaviour", value, tuned, *(found if value in mine else weak)])


def write_run(folder: Path, models: list[str]) -> None:
    """`config.yaml` and `metrics.jsonl` of a run of 900 steps."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "hookpoint: block15\nseed: 0\ncrosscoder: {num_latents: 400, k: 24, dedicated: 0.03}\n"
        "training: {num_tokens: 921600, num_tokens_per_step: 1024, lr: 0.001}\n"
    )
    lines = []
    for step in range(10, 901, 10):
        row: dict[str, float | None] = {
            "step": step,
            "train/loss": 20 * float(np.exp(-step / 200)) + 7,
            "train/l0": 24.0,
        }
        for shift, model in enumerate(models):
            row[f"train/variance_explained/{model}"] = 0.9 - 0.6 * float(np.exp(-step / 150)) + 0.004 * shift
            if step % 100 == 0:
                row[f"val/variance_explained/{model}"] = 0.891 - 0.6 * float(np.exp(-step / 150)) + 0.004 * shift
        lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
