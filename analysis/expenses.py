"""What the language models of all selected pairs will cost, before the first of them is asked anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from analysis.annotate.annotations import DESCRIBED, Annotation, read_annotations
from analysis.annotate.describing import questions_on, records_of, votes_of
from analysis.annotate.step import owned_of
from analysis.config import AnalysisSettings
from analysis.examples.database import read_examples, reading
from analysis.llm.estimating import EXPECTED_OUTPUT
from analysis.llm.ledger import Ledger, ledger_path
from analysis.llm.prices import dollars, price_of
from analysis.llm.questions import Question
from analysis.llm.settling import is_open
from analysis.scoring.judging import PROMPTS
from analysis.scoring.step import CONTROLS, items_of, judge_of
from analysis.taxonomy import placing
from analysis.taxonomy.step import DEFAULT, load_taxonomy, placer_of
from extract.errors import BadInput

# Latents of a pair whose documents are looked at.
SAMPLE = 20
# Tokens of fences around a document, of instructions, and of a description; letters of English to a token.
FENCE, INSTRUCTIONS, DESCRIPTION, LETTERS = 15, 600, 150, 4


def check_expenses(settings: AnalysisSettings, folders: Sequence[Path]) -> None:
    """Says about what is left to ask of the latents of all pairs; BadInput if that costs more than is left.

    Each step estimates again, by the tokens that the server counts; here a study whose first pair alone could be paid
    is told so before it is.
    """
    llm, usd = settings.analysis.llm, 0.0
    tokens = tokens_of(settings, document_tokens(settings, folders))
    with Ledger(ledger_path(settings.outputs)) as ledger:
        left = sum((left_of(settings, folder, ledger) for folder in folders), Counter[tuple[str, str]]())
        for (kind, model), count in left.items():
            output = ledger.mean_output(kind, model) or min(EXPECTED_OUTPUT, llm.max_tokens)
            usd += count * price_of(model, llm, batch=llm.mode == "batch").expected(tokens[kind], output)
        # Questions of open batches are among what is left, at what they are expected to cost; counted at their worst as
        # well, as the ledger has them, they would refuse the rerun of a study that was allowed to start.
        spent = ledger.spent() - (ledger.unknown() if ledger.open_batches() else 0.0)
    if not left:
        return
    num_latents = sum(len(owned_of(folder)) for folder in folders)
    text = f"language models: about {left.total():,} questions on {num_latents:,} latents, about {dollars(usd)}"
    if usd > llm.max_usd - spent:
        raise BadInput(
            f"{text} in all, more than analysis.llm.max_usd ({dollars(llm.max_usd)}, of which {dollars(spent)} are "
            f"spent) allows. Nothing was asked. Raise it to about ${(usd + spent) * 1.1 + 0.01:.2f}, choose a cheaper "
            "analysis.llm.model, analyse fewer pairs, or halve the price by analysis.llm.mode=batch."
        )
    print(text, flush=True)


def left_of(settings: AnalysisSettings, folder: Path, ledger: Ledger) -> Counter[tuple[str, str]]:
    """How many questions on the model-specific latents of a pair are to be asked yet, by kind and model.

    About descriptions that are there the questions are made, as the steps will make them, and looked for in the ledger.
    Of a description that is to come, the placer is asked once, and the judge, if the vote is the primary one, once for
    each kind and control.
    """
    config, llm, judge = settings.analysis, settings.analysis.llm, judge_of(settings.analysis)
    annotations, to_come = descriptions_of(settings, folder, ledger)
    left = Counter((question.kind, question.model) for question in to_come)
    asked: list[Question] = []
    if placer_of(config) == "llm":
        left.update(("categorise", question.model) for question in to_come)
        categories = load_taxonomy(Path(config.taxonomy.path or DEFAULT))
        asked += placing.questions_on(folder.name, annotations, categories, llm).values()
    if judge:
        primary = [question for question in to_come if (question.model, question.repeat) == (llm.model, 0)]
        left.update((kind, judge) for kind in PROMPTS.values() for _ in CONTROLS for _ in primary)
        described = [annotation for annotation in annotations if annotation.vote == 0]
        asked += [item.question for item in items_of(settings, folder, described, judge) if item.question]
    left.update((question.kind, question.model) for question in asked if is_open(question, ledger, llm))
    return left


def descriptions_of(
    settings: AnalysisSettings, folder: Path, ledger: Ledger
) -> tuple[list[Annotation], list[Question]]:
    """The descriptions of a pair that are there, and the questions that lead to those that are not."""
    config, llm = settings.analysis, settings.analysis.llm
    if config.annotate.annotator != "llm":
        return read_annotations(folder, votes=True), []
    owned = owned_of(folder)
    with reading(folder) as database:
        asked, num_documents = questions_on(settings, folder.name, database, [latent for latent, _ in owned])
    to_come = {key: question for key, question in asked.items() if is_open(question, ledger, llm)}
    answers = {key: ledger.answer(question) for key, question in asked.items() if key not in to_come}
    found = records_of(owned, votes_of(llm), num_documents, answers)
    return [annotation for annotation in found if annotation.outcome == DESCRIBED], list(to_come.values())


def tokens_of(settings: AnalysisSettings, document: dict[str, float]) -> dict[str, float]:
    """Input tokens of a question by its kind; `document` holds mean tokens of one by use."""
    config = settings.analysis
    text = placing.instructions(load_taxonomy(Path(config.taxonomy.path or DEFAULT)))
    judged = (config.scoring.positives + config.scoring.negatives) * (document["scoring"] + FENCE)
    return {
        "describe": INSTRUCTIONS + config.annotate.num_documents * (document["annotate"] + FENCE),
        "categorise": len(text) / LETTERS + DESCRIPTION,
        **dict.fromkeys(PROMPTS.values(), INSTRUCTIONS + DESCRIPTION + judged),
    }


def document_tokens(settings: AnalysisSettings, folders: Sequence[Path]) -> dict[str, float]:
    """Mean tokens of a document as the annotator and as the judge see it, from a few latents of each pair."""
    config, lengths = settings.analysis, []
    for folder in folders:
        owned = owned_of(folder)
        with reading(folder) as database:
            for latent, _ in owned[:: max(1, len(owned) // SAMPLE)]:
                examples = read_examples(database, latent, config.annotate.num_documents)
                lengths += [len(example.tokens) for example in examples]
    limits = {"annotate": config.annotate.context_tokens, "scoring": config.scoring.context_tokens}
    return {use: sum(min(length, limit) for length in lengths) / max(1, len(lengths)) for use, limit in limits.items()}
