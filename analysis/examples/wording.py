"""Which words set a latent's activations apart: n-grams near its firing tokens against those of all documents.

Words are whole even where the tokenizer splits them, and n-grams stay within a clause. Score: log-odds with an
informative Dirichlet prior (Monroe et al. 2008, "Fightin' Words").
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from analysis.config import AnnotateConfig
from analysis.examples.database import Example

# Weight of the background in the prior, in words (Monroe et al. 2008 call it alpha_0).
PRIOR_WORDS = 500.0
# An n-gram must stand out this far, in standard errors, to be evidence, ...
MIN_Z = 2.0
# ... and occur in this share of the latent's documents: one document that repeats a word proves nothing.
MIN_SUPPORT = 0.25
# Control tokens of chat templates, such as <|im_start|>, <start_of_turn> or [INST].
TEMPLATE = re.compile(r"<\|[^|>]*\|>|</?(?:start_of_turn|end_of_turn|bos|eos|pad|s)>|\[/?INST\]")
# Template tokens that the name of a role follows.
ROLE_FOLLOWS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>")
CLAUSE_END_OR_WORD = re.compile(r"(?P<word>[^\W_]+(?:['’][^\W_]+)?)|[.!?;:\n]")
# Words that connect others. "not", "cannot" and pronouns stay: they mark refusals and self-reference.
GRAMMAR = frozenset(
    ("a", "an", "the", "of", "to", "in", "on", "at", "for", "and", "or", "but", "is", "are", "was", "were", "be")
    + ("been", "being", "it", "its", "this", "that", "these", "those", "with", "by", "as", "from")
)


@dataclass(frozen=True)
class Word:
    """A lower-case word, the position of the token it starts in, and a number that all words of its clause share."""

    text: str
    token: int
    clause: int


def of_template(tokens: Iterable[str]) -> list[bool]:
    """Which tokens a chat template writes: control tokens, and all that spell the role's name after an opening one."""
    found, in_role = [], False
    for token in tokens:
        in_role = token in ROLE_FOLLOWS or (in_role and token.isalpha())
        found.append(in_role or TEMPLATE.fullmatch(token.strip()) is not None)
    return found


def words_of(tokens: Iterable[str]) -> list[Word]:
    """Words of a document, whole even where the tokenizer splits them; template tokens and punctuation are no words."""
    tokens = list(tokens)
    token_of = np.repeat(np.arange(len(tokens)), [len(token) for token in tokens])
    hidden = of_template(tokens)
    text = "".join("\n" * len(token) if hides else token for token, hides in zip(tokens, hidden, strict=True))
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


@dataclass(frozen=True)
class Evidence:
    """An n-gram that stands out: log-odds over its standard error, and the share of top documents that have it."""

    ngram: str
    z: float
    support: float


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


def without_overlap(ngrams: list[str]) -> list[str]:
    """Each n-gram that shares no word with a stronger one."""
    kept: list[str] = []
    used: set[str] = set()
    for ngram in ngrams:
        if used.isdisjoint(ngram.split()):
            kept.append(ngram)
            used.update(ngram.split())
    return kept
