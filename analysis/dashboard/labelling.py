"""The form for labels by hand: what stands in it for a latent, and what saving it does."""

from __future__ import annotations

from collections.abc import Container, Sequence

from analysis.dashboard.crosscoders import Crosscoder
from analysis.human import HumanLabel, append_label, crosscoder_of, now

SAVED, WITHDRAWN = "Saved.", "Withdrawn."
Latent = tuple[Crosscoder, int]


def form_of(found: Latent | None, path: str | None) -> tuple[list[str | None], list[str], list[str | None]]:
    """Label, category and note as given by hand; the annotator's label and category, shown but saved by nobody; and
    whose form this is, for `save`.
    """
    if found is None:
        return ["", None, ""], ["", "none"], []
    crosscoder, latent = found
    given, placed = crosscoder.human.get(latent), crosscoder.placed.get(latent)
    annotation = crosscoder.annotations.get(latent)
    values = [given.label, given.category or None, given.note] if given else ["", None, ""]
    annotators = [annotation.label if annotation else "", placed.category if placed else ""]
    return values, [f"annotator: {said or 'none'}" for said in annotators], whose(crosscoder, path)


def whose(crosscoder: Crosscoder, path: str | None) -> list[str | None]:
    """The address of a latent, and the weights that it belongs to now."""
    return [path, crosscoder_of(crosscoder.folder)]


def save(
    found: Latent | None,
    path: str | None,
    shown: Sequence[str | None],
    values: Sequence[str | None],
    who: str | None,
    categories: Container[str],
) -> str:
    """Appends what the form holds to the labels of the latent at `path`; returns what to say about it.

    `shown` is whose form it is: still the latent's before while another one opens, or of a crosscoder that was trained
    anew since.
    """
    label, category, note = ((value or "").strip() for value in values)
    if found is None or list(shown) != whose(found[0], path):
        return "Not saved: the page shows another latent. Wait until it has changed, or load it again."
    crosscoder, latent = found
    if (latent not in crosscoder.human and not (label or category)) or not (who or "").strip():
        return "Give a label or a category, and your name."
    if category and category not in categories:
        return f"{category} is no category of the taxonomy."
    try:
        append_label(crosscoder.folder, HumanLabel(latent, label, category, note, str(who).strip(), now()))
    except OSError as error:
        return f"Not saved: {error}."
    return SAVED if label or category else WITHDRAWN
