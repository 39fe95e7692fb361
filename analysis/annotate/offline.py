"""The offline annotator: what the words around a latent's activations have in common, without a language model.

For each model-specific latent the words near its firing tokens are counted in its top documents and set against all
stored documents. What stands out becomes a label; the evidence is quoted. It is a stand-in for a description that
understands the text, and every record says so.
"""

import sqlite3

from analysis.annotate.annotations import ANNOTATOR, MAX_LABEL_WORDS, Annotation
from analysis.config import AnnotateConfig
from analysis.examples.database import Example, all_documents, read_examples
from analysis.examples.wording import (
    MIN_SUPPORT,
    Background,
    Evidence,
    candidates_of,
    count_background,
    find_evidence,
    of_template,
)

FRAGMENT_WORDS = 12


def describe_offline(
    database: sqlite3.Connection, owned: list[tuple[int, str]], config: AnnotateConfig
) -> list[Annotation]:
    """The records of (latent, owner) pairs. Documents are read twice, those of one latent at a time."""
    candidates = {ngram for latent, _ in owned for ngram in candidates_of(_shown(database, latent, config), config)}
    background = count_background(all_documents(database), candidates, config.max_ngram)
    return [describe(latent, owner, _shown(database, latent, config), background, config) for latent, owner in owned]


def _shown(database: sqlite3.Connection, latent: int, config: AnnotateConfig) -> list[Example]:
    return read_examples(database, latent, config.num_documents)


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
    hidden = of_template(example.tokens)
    plain = [" " if hides else token for token, hides in zip(example.tokens, hidden, strict=True)]
    text, cut = "".join(plain), len("".join(plain[: example.peak + 1]))
    before, after = text[:cut], text[cut:]
    glue = "" if before[-1:].strip() and after[:1].strip() else " "
    return (" ".join(before.split()[-FRAGMENT_WORDS:]) + glue + " ".join(after.split()[:FRAGMENT_WORDS])).strip()
