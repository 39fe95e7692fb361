"""The offline annotator: what the words around a latent's activations have in common, without a language model.

For each model-specific latent the words near its firing tokens are counted in its top documents and set against all
stored documents. What stands out becomes a label; the evidence is quoted. It is a stand-in for a description that
understands the text, and every record says so.
"""

import json
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from analysis.config import AnalysisSettings, AnnotateConfig
from extract.publish import publish

ANNOTATOR = "offline (n-grams)"
NOT_MODELS = ("shared", "other", "dead")
# Weight of the background in the prior, in words (Monroe et al. 2008 call it alpha_0).
PRIOR_WORDS = 500.0
# An n-gram must stand out this far, in standard errors, to be evidence, ...
MIN_Z = 2.0
# ... and occur in this share of the latent's documents: one document that repeats a word proves nothing.
MIN_SUPPORT = 0.25
MAX_LABEL_WORDS = 5
FRAGMENT_WORDS = 12
# Control tokens of chat templates, such as <|im_start|>, <start_of_turn> or [INST].
TEMPLATE = re.compile(r"<\|[^|>]*\|>|</?(?:start_of_turn|end_of_turn|bos|eos|pad|s)>|\[/?INST\]")
CLAUSE_END_OR_WORD = re.compile(r"(?P<word>[^\W_]+(?:['’][^\W_]+)?)|[.!?;:\n]")


@dataclass(frozen=True)
class Example:
    """A top document of a latent. `activations` holds the value of every firing token by its position."""

    document: int
    tokens: tuple[str, ...]
    activations: Mapping[int, float]

    @property
    def peak(self) -> int:
        """Position of the strongest activation."""
        return max(self.activations, key=lambda position: self.activations[position])


@dataclass(frozen=True)
class Evidence:
    """An n-gram that stands out: log-odds over its standard error, and the share of top documents that have it."""

    ngram: str
    z: float
    support: float


@dataclass(frozen=True)
class Annotation:
    """One line of `annotations.jsonl`."""

    latent: int
    owner: str
    label: str
    description: str
    confidence: str
    reason: str
    annotator: str
    num_documents: int
    evidence: tuple[Evidence, ...]
    fragments: tuple[str, ...]


def annotate(settings: AnalysisSettings, folder: Path) -> None:
    """Describe every model-specific latent of an analysis folder -> `annotations.jsonl`, whole or not at all."""
    config = settings.analysis.annotate
    latents = pq.read_table(folder / "latents.parquet", columns=["latent", "owner"]).to_pylist()
    owned = [(row["latent"], row["owner"]) for row in latents if row["owner"] not in NOT_MODELS]
    with sqlite3.connect(f"file:{folder / 'examples.sqlite'}?mode=ro", uri=True) as database:
        examples = {latent: read_examples(database, latent, config.num_documents) for latent, _ in owned}
        candidates = {ngram for shown in examples.values() for ngram in candidates_of(shown, config)}
        background = count_background(all_documents(database), candidates, config.max_ngram)
    records = [describe(latent, owner, examples[latent], background, config) for latent, owner in owned]
    lines = "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)
    publish(folder / "annotations.jsonl", lines.encode())


def read_annotations(folder: Path) -> list[Annotation]:
    """The records of `annotations.jsonl`."""
    lines = (folder / "annotations.jsonl").read_text(encoding="utf-8").splitlines()
    return [_annotation(json.loads(line)) for line in lines]


def _annotation(record: dict) -> Annotation:
    evidence = tuple(Evidence(**entry) for entry in record["evidence"])
    return Annotation(**{**record, "evidence": evidence, "fragments": tuple(record["fragments"])})


def all_documents(database: sqlite3.Connection) -> Iterator[list[str]]:
    """Token strings of every stored document."""
    for (tokens,) in database.execute("SELECT text_tokens FROM documents ORDER BY document"):
        yield json.loads(tokens)


def read_examples(database: sqlite3.Connection, latent: int, limit: int) -> list[Example]:
    """The `limit` top documents of a latent, strongest first."""
    rows = database.execute(
        "SELECT document, text_tokens, activations FROM examples JOIN documents USING (document) "
        "WHERE latent = ? ORDER BY rank LIMIT ?",
        (latent, limit),
    )
    return [
        Example(document, tuple(json.loads(tokens)), {int(position): value for position, value in json.loads(fired)})
        for document, tokens, fired in rows
    ]


@dataclass(frozen=True)
class Word:
    """A lower-case word, the position of the token it starts in, and a number that all words of its clause share."""

    text: str
    token: int
    clause: int


def words_of(tokens: Iterable[str]) -> list[Word]:
    """Words of a document, whole even where the tokenizer splits them; template tokens and punctuation are no words."""
    tokens = list(tokens)
    token_of = np.repeat(np.arange(len(tokens)), [len(token) for token in tokens])
    text = "".join("\n" * len(token) if TEMPLATE.fullmatch(token.strip()) else token for token in tokens)
    clause, words = 0, []
    for found in CLAUSE_END_OR_WORD.finditer(text):
        if found["word"] is None:
            clause += 1
        else:
            words.append(Word(found["word"].lower().replace("’", "'"), int(token_of[found.start()]), clause))
    return words


def near(words: list[Word], example: Example, window: int) -> list[Word]:
    """The words within `window` words of a firing token, in order."""
    starts = np.array([word.token for word in words])
    wanted: set[int] = set()
    for position in example.activations:
        centre = int(np.searchsorted(starts, position, side="right"))
        wanted.update(range(max(0, centre - window), min(len(words), centre + window)))
    return [words[index] for index in sorted(wanted)]


def ngrams_of(words: list[Word], longest: int) -> Iterator[str]:
    """Every run of 1 to `longest` words within a clause."""
    for length in range(1, longest + 1):
        for start in range(len(words) - length + 1):
            run = words[start : start + length]
            if run[0].clause == run[-1].clause:
                yield " ".join(word.text for word in run)


@dataclass(frozen=True)
class Background:
    """Occurrences of the n-grams of interest in all documents, and of any n-gram."""

    counts: Counter[str]
    total: int


def count_background(documents: Iterable[list[str]], wanted: set[str], longest: int) -> Background:
    """One pass over the documents that keeps what is `wanted` alone: all n-grams of a corpus do not fit in memory."""
    counts: Counter[str] = Counter()
    total = 0
    for tokens in documents:
        found = list(ngrams_of(words_of(tokens), longest))
        total += len(found)
        counts.update(ngram for ngram in found if ngram in wanted)
    return Background(counts, total)


def log_odds(counts: Counter[str], background: Background) -> dict[str, float]:
    """How far each n-gram stands out from the background, in standard errors (Monroe et al. 2008, eq. 16-22).

        alpha_w = PRIOR_WORDS * b_w / b                              y: near the latent, b: in all documents
        delta_w = log((y_w + alpha_w) / (y + alpha - y_w - alpha_w)) - the same of b
        z_w     = delta_w / sqrt(1 / (y_w + alpha_w) + 1 / (b_w + alpha_w))

    The prior pulls rare words towards no difference, so that a word seen once does not win.
    """
    y_w = np.array(list(counts.values()), dtype=float)
    # Two surroundings in one document can meet in an n-gram that the document itself does not have.
    b_w = np.maximum([background.counts[ngram] for ngram in counts], y_w)
    y, b = y_w.sum(), max(float(background.total), b_w.sum())
    alpha_w = PRIOR_WORDS * b_w / b
    inside = np.log((y_w + alpha_w) / (y + PRIOR_WORDS - y_w - alpha_w))
    outside = np.log((b_w + alpha_w) / (b + PRIOR_WORDS - b_w - alpha_w))
    z_w = (inside - outside) / np.sqrt(1 / (y_w + alpha_w) + 1 / (b_w + alpha_w))
    return dict(zip(counts, z_w.tolist(), strict=True))


def surroundings_of(examples: list[Example], config: AnnotateConfig) -> list[list[str]]:
    """Per document, the n-grams near its firing tokens."""
    near_each = [near(words_of(example.tokens), example, config.window) for example in examples]
    return [list(ngrams_of(words, config.max_ngram)) for words in near_each]


def candidates_of(examples: list[Example], config: AnnotateConfig) -> set[str]:
    """The n-grams that enough of a latent's documents share and that name something."""
    support = Counter(ngram for ngrams in surroundings_of(examples, config) for ngram in set(ngrams))
    least = max(2, MIN_SUPPORT * len(examples))
    return {ngram for ngram, count in support.items() if count >= least and worded(ngram)}


def find_evidence(examples: list[Example], background: Background, config: AnnotateConfig) -> tuple[Evidence, ...]:
    """The n-grams that set the surroundings of the firing tokens apart, strongest first, none sharing a word."""
    surroundings = surroundings_of(examples, config)
    share = {
        ngram: sum(ngram in set(ngrams) for ngrams in surroundings) / len(examples)
        for ngram in candidates_of(examples, config)
    }
    scores = log_odds(Counter(ngram for ngrams in surroundings for ngram in ngrams), background)
    ranked = sorted(
        (ngram for ngram in share if scores[ngram] >= MIN_Z),
        key=lambda ngram: (-round(scores[ngram] * share[ngram], 1), -len(ngram), ngram),
    )
    return tuple(Evidence(ngram, scores[ngram], share[ngram]) for ngram in without_overlap(ranked)[:6])


def worded(ngram: str) -> bool:
    """False for an n-gram that begins or ends with a word of grammar or a number, and so names nothing."""
    words = ngram.split()
    ends = (words[0], words[-1])
    return (
        not GRAMMAR.intersection(ends)
        and not any(word.isdigit() for word in ends)
        and any(len(word) > 1 for word in words)
    )


# Words that connect others. "not", "cannot" and pronouns stay: they mark refusals and self-reference.
GRAMMAR = frozenset(
    ("a", "an", "the", "of", "to", "in", "on", "at", "for", "and", "or", "but", "is", "are", "was", "were", "be")
    + ("been", "being", "it", "its", "this", "that", "these", "those", "with", "by", "as", "from")
)


def without_overlap(ngrams: list[str]) -> list[str]:
    """Each n-gram that shares no word with a stronger one."""
    kept: list[str] = []
    used: set[str] = set()
    for ngram in ngrams:
        if used.isdisjoint(ngram.split()):
            kept.append(ngram)
            used.update(ngram.split())
    return kept


def describe(
    latent: int, owner: str, examples: list[Example], background: Background, config: AnnotateConfig
) -> Annotation:
    """The record of one latent."""
    evidence = find_evidence(examples, background, config) if examples else ()
    confidence, reason = judge(evidence, len(examples))
    fragments = tuple(fragment(example) for example in examples[:3])
    return Annotation(
        latent=latent,
        owner=owner,
        label=label_of(evidence),
        description=description_of(evidence, fragments),
        confidence=confidence,
        reason=reason,
        annotator=ANNOTATOR,
        num_documents=len(examples),
        evidence=evidence,
        fragments=fragments,
    )


def label_of(evidence: tuple[Evidence, ...]) -> str:
    """One to five words: the strongest n-grams that fit."""
    chosen: list[str] = []
    for entry in evidence[:3]:
        if sum(len(ngram.split()) for ngram in [*chosen, entry.ngram]) <= MAX_LABEL_WORDS:
            chosen.append(entry.ngram)
    return ", ".join(chosen) or "no common wording"


def description_of(evidence: tuple[Evidence, ...], fragments: tuple[str, ...]) -> str:
    """A sentence that quotes the evidence and one place where the latent fires."""
    place = f" For example: “{fragments[0]}”." if fragments else ""
    if not evidence:
        return f"No wording sets the documents of this latent apart.{place}"
    quoted = ", ".join(f"“{entry.ngram}” ({entry.support:.0%})" for entry in evidence)
    return f"Fires near {quoted} of its top documents.{place}"


def judge(evidence: tuple[Evidence, ...], num_documents: int) -> tuple[str, str]:
    """Confidence and its reason, from how many documents share the strongest n-gram and how far it stands out."""
    if not evidence:
        return "low", f"no n-gram stands out in at least {MIN_SUPPORT:.0%} of {num_documents} documents"
    best = evidence[0]
    share = f"{round(best.support * num_documents)} of {num_documents}"
    reason = f"“{best.ngram}” is near the activations in {share} documents (z = {best.z:.1f})"
    if num_documents >= 5 and best.support >= 0.8 and best.z >= 4:
        return "high", reason
    return ("medium", reason) if num_documents >= 5 and best.support >= 0.5 else ("low", reason)


def fragment(example: Example) -> str:
    """The words around the strongest activation, on one line, without template tokens."""
    plain = [" " if TEMPLATE.fullmatch(token.strip()) else token for token in example.tokens]
    text, cut = "".join(plain), len("".join(plain[: example.peak + 1]))
    before, after = text[:cut], text[cut:]
    glue = "" if before[-1:].strip() and after[:1].strip() else " "
    return (" ".join(before.split()[-FRAGMENT_WORDS:]) + glue + " ".join(after.split()[:FRAGMENT_WORDS])).strip()
