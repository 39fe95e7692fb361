"""What the language models of all selected pairs will cost, before the first of them is asked anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from analysis.config import NOT_MODELS, AnalysisSettings
from analysis.examples.database import read_examples, reading
from analysis.llm.estimating import EXPECTED_OUTPUT
from analysis.llm.ledger import Ledger, ledger_path
from analysis.llm.prices import BATCH_FACTOR, MILLION, dollars, price_of
from analysis.scoring.step import CONTROLS, judge_of
from analysis.taxonomy.placing import instructions
from analysis.taxonomy.step import DEFAULT, load_taxonomy, placer_of
from extract.errors import BadInput

# Latents of a pair whose documents are looked at.
SAMPLE = 20
# Tokens of fences around a document, of instructions, and of a description; letters of English to a token.
FENCE, INSTRUCTIONS, DESCRIPTION, LETTERS = 15, 600, 150, 4


@dataclass(frozen=True)
class Expense:
    """Questions of one kind to one model, and tokens of each."""

    kind: str
    model: str
    count: int
    input_tokens: float


def check_expenses(settings: AnalysisSettings, folders: Sequence[Path]) -> None:
    """Says about what is left to ask of the latents of all pairs; BadInput if that costs more than is left.

    Each step estimates again, by the tokens that the server counts; here a study whose first pair alone could be paid
    is told so before it is.
    """
    llm, owned = settings.analysis.llm, {folder: owned_of(folder) for folder in folders}
    num_latents = sum(map(len, owned.values()))
    if not num_latents:
        return
    usd, count, factor = 0.0, 0, BATCH_FACTOR if llm.mode == "batch" else 1.0
    with Ledger(ledger_path(settings.outputs)) as ledger:
        for each in expenses_of(settings, num_latents, document_tokens(settings, owned)):
            missing = max(0, each.count - ledger.num_concluded(each.kind, each.model))
            price = price_of(each.model, llm)
            output = ledger.mean_output(each.kind, each.model) or min(EXPECTED_OUTPUT, llm.max_tokens)
            usd += factor * missing * (each.input_tokens * price.input + output * price.output) / MILLION
            count += missing
        spent = ledger.spent()
    text = f"language models: about {count:,} questions on {num_latents:,} latents, about {dollars(usd)}"
    if usd > llm.max_usd - spent:
        raise BadInput(
            f"{text} in all, more than analysis.llm.max_usd ({dollars(llm.max_usd)}, of which {dollars(spent)} are "
            f"spent) allows. Nothing was asked. Raise it to about ${(usd + spent) * 1.1 + 0.01:.2f}, choose a cheaper "
            "analysis.llm.model, analyse fewer pairs, or halve the price by analysis.llm.mode=batch."
        )
    print(text, flush=True)


def expenses_of(settings: AnalysisSettings, num_latents: int, document: dict[str, float]) -> list[Expense]:
    """All questions on so many latents, were nothing answered yet; `document` holds mean tokens of one by use."""
    config, llm = settings.analysis, settings.analysis.llm
    describes, judge = config.annotate.annotator == "llm", judge_of(config)
    shown = INSTRUCTIONS + config.annotate.num_documents * (document["annotate"] + FENCE)
    found = [Expense("describe", model, num_latents * llm.repeats, shown) for model in llm.models if describes]
    if placer_of(config) == "llm":
        text = instructions(load_taxonomy(Path(config.taxonomy.path or DEFAULT)))
        tokens = len(text) / LETTERS + DESCRIPTION
        votes = dict.fromkeys(llm.models, llm.repeats) if describes else {llm.model: 1}
        found += [Expense("categorise", model, num_latents * repeats, tokens) for model, repeats in votes.items()]
    if judge:
        documents = config.scoring.positives + config.scoring.negatives
        tokens = INSTRUCTIONS + DESCRIPTION + documents * (document["scoring"] + FENCE)
        found += [Expense(kind, judge, num_latents * len(CONTROLS), tokens) for kind in ("detect", "fuzz")]
    return found


def owned_of(folder: Path) -> list[int]:
    """The model-specific latents of an analysis folder."""
    latents = pq.read_table(folder / "latents.parquet", columns=["latent", "owner"]).to_pylist()
    return [row["latent"] for row in latents if row["owner"] not in NOT_MODELS]


def document_tokens(settings: AnalysisSettings, owned: dict[Path, list[int]]) -> dict[str, float]:
    """Mean tokens of a document as the annotator and as the judge see it, from a few latents of each pair."""
    config, lengths = settings.analysis, []
    for folder, latents in owned.items():
        with reading(folder) as database:
            for latent in latents[:: max(1, len(latents) // SAMPLE)]:
                examples = read_examples(database, latent, config.annotate.num_documents)
                lengths += [len(example.tokens) for example in examples]
    limits = {"annotate": config.annotate.context_tokens, "scoring": config.scoring.context_tokens}
    return {use: sum(min(length, limit) for length in lengths) / max(1, len(lengths)) for use, limit in limits.items()}
