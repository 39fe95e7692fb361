"""LoRA tuning of one variant on preference pairs, with either loss."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from demo.generation import as_chat
from demo.pairs import Answer, Pair
from demo.preference_losses import answer_log_probs, dpo_loss, mean_log_prob, simpo_loss


@dataclass(frozen=True)
class TuningSettings:
    """How one variant is tuned; the values of both variants stand in `SETTINGS`."""

    method: str  # "simpo" or "dpo"
    beta: float  # inverse temperature of the loss
    gamma: float = 0.0  # SimPO's target margin; DPO has none
    nll_weight: float = 2.0  # of the chosen answers' mean negative log-likelihood per token, added to the loss
    learning_rate: float = 1.5e-3  # of AdamW, after a warm-up over the first tenth, falling linearly to zero
    num_steps: int = 120
    pairs_per_step: int = 8
    rank: int = 8  # of the LoRA matrices, on all attention and MLP projections of `blocks`
    # First block with LoRA and one past the last: whatever is learned must be in the residual stream after block 15,
    # where the demo looks; with LoRA in all blocks most of it came later, and earlier ones drifted.
    blocks: tuple[int, int] = (4, 16)
    seed: int = 0  # of the LoRA initialisation and of the order of the pairs


SETTINGS = {
    "simpo": TuningSettings(method="simpo", beta=2.0, gamma=1.0),
    "dpo": TuningSettings(method="dpo", beta=0.1),
}


@dataclass(frozen=True)
class AnswerBatch:
    """Prompts padded on the left and answers on the right, so that every answer starts at the same column."""

    tokens_BS: Tensor  # prompt columns, then answer columns
    attended_BS: Tensor
    is_answer_BT: Tensor  # over the answer columns alone


def tune(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], settings: TuningSettings
) -> PeftModel:
    """`model` with a LoRA adapter tuned on `pairs`. The model's own weights stay as they are; every run is the same."""
    torch.manual_seed(settings.seed)
    tuned = get_peft_model(model, lora_config(settings))
    weights = [weight for weight in tuned.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_and_decay(settings.num_steps))
    for step, step_pairs in enumerate(steps(pairs, settings)):
        loss, margin = preference_step(tuned, tokenizer, step_pairs, settings)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == settings.num_steps - 1:
            print(f"  {settings.method} step {step:3d}  loss {loss.item():.4f}  margin {margin:.3f}", flush=True)
    return tuned


def lora_config(settings: TuningSettings) -> LoraConfig:
    """LoRA on every linear projection inside the chosen blocks."""
    return LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        layers_to_transform=list(range(*settings.blocks)),
        task_type="CAUSAL_LM",
    )


def warm_up_and_decay(num_steps: int) -> Callable[[int], float]:
    """The learning rate's factor: up over the first tenth of the steps, then linearly down to zero."""
    warm_up = max(1, num_steps // 10)
    return lambda step: min((step + 1) / warm_up, (num_steps - step) / (num_steps - warm_up + 1))


def steps(pairs: Sequence[Pair], settings: TuningSettings) -> Iterator[list[Pair]]:
    """`num_steps` batches of pairs: epoch after epoch, each in another seeded order."""
    order = random.Random(settings.seed)
    waiting: list[Pair] = []
    for _ in range(settings.num_steps):
        while len(waiting) < settings.pairs_per_step:
            waiting += order.sample(pairs, len(pairs))
        yield waiting[: settings.pairs_per_step]
        waiting = waiting[settings.pairs_per_step :]


def preference_step(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], settings: TuningSettings
) -> tuple[Tensor, float]:
    """The mean loss over `pairs`, and the mean margin chosen - rejected that enters it, in nats."""
    prompts = [pair.prompt for pair in pairs]
    answers = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    batch = answer_batch(tokenizer, prompts * 2, answers)
    log_probs_BT = forward_log_probs(model, batch)
    chosen_mean, rejected_mean = mean_log_prob(log_probs_BT, batch.is_answer_BT).chunk(2)
    if settings.method == "simpo":
        margin = chosen_mean - rejected_mean
        loss = simpo_loss(chosen_mean, rejected_mean, settings.beta, settings.gamma)
    else:
        with torch.no_grad(), model.disable_adapter():
            reference_chosen, reference_rejected = forward_log_probs(model, batch).sum(1).chunk(2)
        chosen, rejected = log_probs_BT.sum(1).chunk(2)
        margin = (chosen - reference_chosen) - (rejected - reference_rejected)
        loss = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, settings.beta)
    return (loss - settings.nll_weight * chosen_mean).mean(), margin.mean().item()


def forward_log_probs(model: PeftModel, batch: AnswerBatch) -> Tensor:
    """Log-probabilities (B, T) of the answer tokens. Rotary positions are relative, so left padding needs no shift.

    fp32 weights under bf16 autocast: three times as fast as either type alone, forward and backward, on a CPU with AMX.
    """
    num_answer_columns = batch.is_answer_BT.shape[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_BTV = model(
            input_ids=batch.tokens_BS,
            attention_mask=batch.attended_BS,
            logits_to_keep=num_answer_columns + 1,
            use_cache=False,
        ).logits[:, :-1]
    return answer_log_probs(logits_BTV, batch.tokens_BS[:, -num_answer_columns:], batch.is_answer_BT)


def answer_batch(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[Answer]) -> AnswerBatch:
    """Tokenises prompts (with the chat template) and answers (with the end-of-turn token where they ended)."""
    ends = [answer.text + (tokenizer.eos_token if answer.ended else "") for answer in answers]
    chats = [as_chat(tokenizer, prompt) for prompt in prompts]
    left = tokenizer(chats, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    right = tokenizer(ends, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt")
    return AnswerBatch(
        tokens_BS=torch.cat([left["input_ids"], right["input_ids"]], dim=1),
        attended_BS=torch.cat([left["attention_mask"], right["attention_mask"]], dim=1),
        is_answer_BT=right["attention_mask"].bool(),
    )
