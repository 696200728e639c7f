"""Questions as token sequences, their batches, and a model's logits at the predicted positions.

Training, the teacher cache and every comparison of two models use these functions, so a position means the same in all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from medkit.modeling import prefix_tree
from medkit.prompts import templates

PASSES = 32  # so many nearly empty forward passes take as long as a full batch
PACKED_TOKENS = 512  # of a forward pass over packed examples: attention grows with the square
DRIFT_ROWS = 256  # compared at once: float32 log-probabilities over 152,000 tokens take 156 MB


@dataclass(frozen=True)
class Example:
    """One token sequence; the tokens from `loss_start` on are predicted, those before are given."""

    input_ids: list[int]
    loss_start: int

    @property
    def num_predicted(self) -> int:
        return len(self.input_ids) - self.loss_start


def encode_questions(tokenizer, questions: pd.DataFrame) -> list[Example]:
    """One example per question row, whose answer is known. The loss covers the answer and its end token."""
    examples = []
    for question in questions.to_dict("records"):
        template = templates.pick_template(question["kind"], "option_text")
        answer = templates.answers(question, template)[question["answer"]]
        prompt_ids, answer_ids = templates.encode(tokenizer, templates.render(question, template), answer)
        examples.append(Example([*prompt_ids, *answer_ids], len(prompt_ids)))
    return examples


def bucket_by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Batches of indices, longest first, of at most `batch_tokens` tokens with padding; a longer item goes alone.

    The sorted items are cut so that padding is least, by dynamic programming; each batch costs batch_tokens / PASSES
    tokens more, for its forward pass.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    least = np.full(len(order) + 1, np.inf)  # by number of items: the tokens of their best batches
    least[0], batch_starts = 0, np.zeros(len(least), int)
    for start, item in enumerate(order):
        most = min(max(1, batch_tokens // lengths[item]), len(order) - start)
        costs = least[start] + batch_tokens / PASSES + lengths[item] * np.arange(1, most + 1)
        better = np.flatnonzero(costs <= least[start + 1 : start + 1 + most])
        least[start + 1 + better], batch_starts[start + 1 + better] = costs[better], start
    batches, end = [], len(order)
    while end:
        batches.append(order[batch_starts[end] : end])
        end = batch_starts[end]
    return batches[::-1]


def letter_forms(tokenizer, letter: str) -> list[list[int]]:
    """The tokens of a letter that names an option: the letter alone, and the letter after a space, as one-token lists.

    Tokenizer, template and training decide which of them follows a prompt ("A" after a line break, " A" after
    "Answer:"), so the probability of a letter is the sum over them. Raises ValueError if the letter is not one token.
    """
    last_tokens = {tokenizer(before + letter, add_special_tokens=False).input_ids[-1] for before in ("", " ", "\n")}
    forms = sorted(token for token in last_tokens if tokenizer.decode([token]).strip() == letter)
    if not forms:
        raise ValueError(f"{letter!r} is not one token of this tokenizer; score the texts of the options instead")
    return [[token] for token in forms]


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch with one row per example, padded on the left.

    `labels` (N,): the predicted tokens, example by example. `predicted_at` (N,): the positions whose logits predict
    them, counted over all rows one after another.
    """
    length = max(len(e.input_ids) for e in examples)
    input_ids = torch.full((len(examples), length), pad_token_id)
    attention_mask = torch.zeros(len(examples), length, dtype=torch.long)
    for row, example in enumerate(examples):
        input_ids[row, length - len(example.input_ids) :] = torch.tensor(example.input_ids)
        attention_mask[row, length - len(example.input_ids) :] = 1
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    ends = [(row + 1) * length - 1 for row in range(len(examples))]  # what follows a row's last token is not known
    predicted_at = [p for end, e in zip(ends, examples, strict=True) for p in range(end - e.num_predicted, end)]
    return {
        "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
        "predicted_at": torch.tensor(predicted_at, dtype=torch.long), "labels": _labels(examples),
    }  # fmt: skip


def pack(examples: Sequence[Example], share: bool = True) -> dict[str, torch.Tensor]:
    """A batch with all examples in one row, without padding; the predictions are those of `collate`.

    Prefixes that examples share are read once, and a mask (1, T, T) lets each token attend to its own example only.
    With `share` off there is no mask: positions restart at each example, and so FlashAttention separates them.
    """
    tree = prefix_tree.build_tree([e.input_ids[:-1] for e in examples], share)  # last tokens are predicted, not read
    predicted_at = [p for e, path in zip(examples, tree.paths, strict=True) for p in path[e.loss_start - 1 :]]
    batch = {"input_ids": torch.tensor([tree.token_ids]), "position_ids": torch.tensor([tree.depths])}
    if share:
        batch["attention_mask"] = tree.mask()[None]
    return {**batch, "predicted_at": torch.tensor(predicted_at, dtype=torch.long), "labels": _labels(examples)}


def _labels(examples: Sequence[Example]) -> torch.Tensor:
    return torch.tensor([token for e in examples for token in e.input_ids[e.loss_start :]], dtype=torch.long)


def cut(examples: Sequence[Example], batch_tokens: int, share: bool = True) -> list[list[int]]:
    """Batches of indices that have at most `batch_tokens` tokens when packed; a longer example is a batch alone."""
    return prefix_tree.cut_by_prefix([e.input_ids[:-1] for e in examples], batch_tokens, share)


@dataclass(frozen=True)
class Predicted:
    """A model's output at the N predicted positions of a batch."""

    logits: torch.Tensor  # (N, vocab_size) float32
    targets: torch.Tensor  # (N,) the tokens that stand there
    hidden: dict[int, torch.Tensor]
    """Layer → hidden states (N, H) float32; layer 0 is the embedding, n the output of layer n."""


def model_inputs(model: nn.Module, batch: dict) -> dict:
    """The model's keyword arguments for a batch of `collate` or `pack`."""
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 3:
        mask = prefix_tree.additive_masks(model, mask, batch["position_ids"])
    ids, positions = batch["input_ids"], batch["position_ids"]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}


def predict(model: nn.Module, batch: dict, hidden_layers: Sequence[int] = ()) -> Predicted:
    """Logits, and hidden states of `hidden_layers`, at the predicted positions; the head computes no others.

    Layers count as in transformers' `output_hidden_states`: the states of the last one are after the final norm.
    """
    inner, at = extract_model_from_parallel(model), batch["predicted_at"]
    # transformers' `logits_to_keep` keeps the same columns of all rows; this keeps each row's predicted positions.
    # the call is `model(...)`, because DDP and FSDP hook into it
    with inner.get_output_embeddings().register_forward_pre_hook(lambda _, args: (_take(args[0], at),)):
        output = model(**model_inputs(inner, batch), output_hidden_states=bool(hidden_layers))
    hidden = {layer: _take(output.hidden_states[layer], at).float() for layer in hidden_layers}
    return Predicted(output.logits.float(), batch["labels"], hidden)


def _take(states: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """States (N, H) at these positions of all rows; those of the last layers may be on another device."""
    return states.flatten(0, 1)[at.to(states.device)]


def iterate_packed(
    model: nn.Module, examples: Sequence[Example]
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Batches of examples that share prefixes: the examples' indices, and `pack` of them on the model's device."""
    share = prefix_tree.takes_branches(model)
    for rows in cut(examples, PACKED_TOKENS, share):
        batch = pack([examples[i] for i in rows], share)
        yield rows, {name: tensor.to(model.device) for name, tensor in batch.items()}


@torch.inference_mode()
def iterate_predicted(
    model: nn.Module, examples: Sequence[Example], hidden_layers: Sequence[int] = ()
) -> Iterator[tuple[list[int], Predicted]]:
    """Batches as of `iterate_packed`: the examples' indices, and the model's output at their predicted positions."""
    for rows, batch in iterate_packed(model, examples):
        yield rows, predict(model, batch, hidden_layers)


def collect_logits(model: nn.Module, examples: Sequence[Example]) -> torch.Tensor:
    """Logits (N, vocab_size) of all predicted positions, as `Predictions` has them."""
    return torch.cat([p.logits.to("cpu", model.dtype) for _, p in iterate_predicted(model, examples)])


@dataclass(frozen=True)
class Predictions:
    """What a model predicts for some examples."""

    logits: torch.Tensor
    """(N, vocab_size) of all predicted positions, in the same order for every model; on the CPU, in the model's dtype:
    with a large vocabulary they take gigabytes."""
    nll: np.ndarray  # (examples,) mean −log p of each example's predicted tokens, in nats


def predict_examples(model: nn.Module, examples: Sequence[Example]) -> Predictions:
    """Logits and losses of the examples from one pass without dropout."""
    model.eval()
    logits, nll = [], np.empty(len(examples))
    for rows, predicted in iterate_predicted(model, examples):
        losses = nn.functional.cross_entropy(predicted.logits, predicted.targets, reduction="none")
        nll[rows] = [part.mean().item() for part in losses.split([examples[i].num_predicted for i in rows])]
        logits.append(predicted.logits.to("cpu", model.dtype))
    return Predictions(torch.cat(logits), nll)


def measure_drift(before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    """Change of logits (N, V): mean KL(before ‖ after) in nats, largest change, share of changed top tokens."""
    parts = []
    for old, new in zip(before.split(DRIFT_ROWS), after.split(DRIFT_ROWS), strict=True):
        p, q = old.float().log_softmax(-1), new.float().log_softmax(-1)
        changed = (old.argmax(-1) != new.argmax(-1)).float()
        parts.append(((p.exp() * (p - q)).sum(-1), (old.float() - new.float()).abs().amax(-1), changed))
    kl_nats, change, changed = (torch.cat(values) for values in zip(*parts, strict=True))
    return {
        "positions": len(before),
        "kl_nats": kl_nats.mean().item(),
        "max_abs_logit": change.max().item(),
        "top1_changed": changed.mean().item(),
    }
