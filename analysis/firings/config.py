"""Settings of the pass over a store: what is kept of documents, and what uncertainty is measured with."""

from dataclasses import dataclass

from extract.errors import BadInput

# Latents that documents can be drawn for.
SAMPLED = ("all", "held")
MOST_GROUPS = 1024
# Groups times latents, which are numbered in int32: 64 groups of 33 million latents.
MOST_ROWS = 2**31


@dataclass
class ExamplesConfig:
    """Which documents are kept to show what a latent responds to, texts that occur twice counted once."""

    # Documents with the highest activation that are stored for every latent.
    top_documents: int = 20
    # Strata of equal size that a latent's activating documents are cut into by their maximum.
    num_quantiles: int = 10
    # Documents drawn from each of them.
    samples_per_quantile: int = 5
    # Documents drawn among those in which a latent never fires.
    num_silent: int = 25
    # Documents kept in which a latent does not fire, and comes nearest to it.
    num_near_miss: int = 25
    # Latents that documents are drawn for: "all" (about 8 kB of memory each), or "held", those that their decoder norms
    # allow some of the models, but not all, to own.
    sampled: str = "all"
    # Seed of the drawing.
    seed: int = 0


@dataclass
class IntervalsConfig:
    """Bootstrap intervals of nu over documents."""

    # Groups of documents that are resampled. Sums take 8 * groups * num_latents * (1 + 2 * num_models^2) bytes.
    groups: int = 64
    # Bootstrap resamples.
    resamples: int = 500
    # Coverage of the intervals.
    confidence: float = 0.95
    # Seed of the resampling.
    seed: int = 0


@dataclass
class NullsConfig:
    """What nu is where nothing is to be found: random directions in place of a latent's own."""

    # Latents, drawn at random, that get a random direction besides their own.
    num_latents: int = 500
    # Seed of the drawing.
    seed: int = 0


def check_pass(examples: ExamplesConfig, intervals: IntervalsConfig, nulls: NullsConfig) -> None:
    """Raises BadInput for the first field that cannot be used."""
    for name, value, least in (
        ("examples.top_documents", examples.top_documents, 1),
        ("examples.num_quantiles", examples.num_quantiles, 1),
        ("examples.samples_per_quantile", examples.samples_per_quantile, 1),
        ("examples.num_silent", examples.num_silent, 0),
        ("examples.num_near_miss", examples.num_near_miss, 0),
        ("intervals.groups", intervals.groups, 2),
        ("intervals.resamples", intervals.resamples, 1),
        ("nulls.num_latents", nulls.num_latents, 1),
    ):
        if value < least:
            raise BadInput(f"analysis.{name} ({value}) must be at least {least}.")
    seeds = {"examples.seed": examples.seed, "intervals.seed": intervals.seed, "nulls.seed": nulls.seed}
    for name, seed in seeds.items():
        if not 0 <= seed < 2**63:
            raise BadInput(f"analysis.{name} ({seed}) must lie between 0 and 2^63 - 1.")
    if intervals.groups > MOST_GROUPS:
        raise BadInput(
            f"analysis.intervals.groups ({intervals.groups}) must be at most {MOST_GROUPS}: sums are kept of every "
            "group and latent, and 64 groups give good intervals."
        )
    if examples.sampled not in SAMPLED:
        raise BadInput(f'analysis.examples.sampled ({examples.sampled}) must be "all" or "held".')
    if not 0 < intervals.confidence < 1:
        raise BadInput(f"analysis.intervals.confidence ({intervals.confidence}) must lie between 0 and 1.")


def check_groups(groups: int, num_latents: int) -> None:
    """Raises BadInput for more groups of latents than can be numbered."""
    if groups * num_latents > MOST_ROWS:
        raise BadInput(
            f"analysis.intervals.groups ({groups}) times {num_latents:,} latents are more than {MOST_ROWS:,}. Set at "
            f"most {MOST_ROWS // num_latents} groups."
        )
