"""Questions → token sequences → batches → logits at the positions that are predicted, and nowhere else.

Training, signal capture and every comparison of two models go through these few functions, so a position means the same
in all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from medkit.modeling import prefix_tree
from medkit.modeling.prefix_tree import shared_length
from medkit.prompts import templates


@dataclass(frozen=True)
class Example:
    """One training sequence; positions from `loss_start` on are predicted, the rest is given."""

    input_ids: list[int]
    loss_start: int

    @property
    def num_predicted(self) -> int:
        return len(self.input_ids) - self.loss_start


def encode_questions(tokenizer, questions: pd.DataFrame) -> list[Example]:
    """One example per question row. The loss covers the answer and its end token, nothing else.

    A row without an answer (split `transfer`) is learned as text: the loss covers the question itself.
    """
    return [_encode(tokenizer, question) for question in questions.to_dict("records")]


def _encode(tokenizer, question: dict) -> Example:
    template = templates.pick_template(question["kind"], "option_text")
    messages = templates.render(question, template)
    if question["answer"] >= 0:
        answer = templates.answers(question, template)[question["answer"]]
        prompt_ids, answer_ids = templates.encode(tokenizer, messages, answer)
        return Example([*prompt_ids, *answer_ids], len(prompt_ids))
    text_ids, _ = templates.encode(tokenizer, messages)
    frame_ids, _ = templates.encode(tokenizer, [messages[0], {"role": "user", "content": ""}])
    before = shared_length(text_ids, frame_ids)
    after = shared_length(text_ids[before:][::-1], frame_ids[before:][::-1])
    return Example(text_ids[: len(text_ids) - after], before)


def bucket_by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Batches of indices, longest first, of at most `batch_tokens` tokens with padding; a longer item goes alone."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def letter_forms(tokenizer, letter: str) -> list[list[int]]:
    """The tokens by which a model may name an option: the letter as it is, and the letter after a space.

    Which of them follows a prompt depends on tokenizer, template and training ("A" after a chat header's line break,
    " A" after "Answer:"), so the probability of a letter is the sum over its forms. Raises ValueError if the letter is
    no token of its own.
    """
    ends = {tokenizer(before + letter, add_special_tokens=False).input_ids[-1] for before in ("", " ", "\n")}
    forms = sorted(token for token in ends if tokenizer.decode([token]).strip() == letter)
    if not forms:
        raise ValueError(f"{letter!r} is no token of this tokenizer; score the options' texts instead")
    return [[token] for token in forms]


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A row per example, padded on the left. `predicted_at` (N,): where, in all rows one after another, the `labels`
    (N,) are predicted, example by example."""
    length = max(len(e.input_ids) for e in examples)
    input_ids = torch.full((len(examples), length), pad_token_id)
    attention_mask = torch.zeros(len(examples), length, dtype=torch.long)
    for row, example in enumerate(examples):
        input_ids[row, length - len(example.input_ids) :] = torch.tensor(example.input_ids)
        attention_mask[row, length - len(example.input_ids) :] = 1
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    ends = [(row + 1) * length - 1 for row in range(len(examples))]  # the last token predicts nothing that is known
    predicted_at = [p for end, e in zip(ends, examples, strict=True) for p in range(end - e.num_predicted, end)]
    return {
        "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
        "predicted_at": torch.tensor(predicted_at, dtype=torch.long), "labels": _labels(examples),
    }  # fmt: skip


def pack(examples: Sequence[Example], share: bool = True) -> dict[str, torch.Tensor]:
    """All examples in one row without padding, what they begin with alike read once, each seeing itself alone.

    Gives the predictions that `collate` gives. The mask, (1, T, T), says who sees whom; with `share` off there is none,
    and positions restart at each example, which is how FlashAttention tells them apart.
    """
    tree = prefix_tree.grow([e.input_ids[:-1] for e in examples], share)  # the last tokens are predicted, never read
    predicted_at = [p for e, path in zip(examples, tree.paths, strict=True) for p in path[e.loss_start - 1 :]]
    batch = {"input_ids": torch.tensor([tree.token_ids]), "position_ids": torch.tensor([tree.depths])}
    if share:
        batch["attention_mask"] = tree.sees()[None]
    return {**batch, "predicted_at": torch.tensor(predicted_at, dtype=torch.long), "labels": _labels(examples)}


def _labels(examples: Sequence[Example]) -> torch.Tensor:
    return torch.tensor([token for e in examples for token in e.input_ids[e.loss_start :]], dtype=torch.long)


def cut(examples: Sequence[Example], batch_tokens: int, share: bool = True) -> list[list[int]]:
    """Batches of indices that fill at most `batch_tokens` tokens each when packed; a longer example goes alone."""
    return prefix_tree.cut_by_prefix([e.input_ids[:-1] for e in examples], batch_tokens, share)


@dataclass(frozen=True)
class Predicted:
    """What a model says at the N labelled positions of a batch."""

    logits: torch.Tensor
    """(N, vocab_size) float32."""
    targets: torch.Tensor
    """(N,) the tokens that follow."""
    hidden: dict[int, torch.Tensor]
    """Layer → (N, H) float32: the states that the logits are made of; 0 is the embedding, n the output of layer n."""


def predict(model: nn.Module, batch: dict, hidden_layers: Sequence[int] = ()) -> Predicted:
    """Logits, and the hidden states of the layers asked for, at the labelled positions; the head sees no others.

    Layers count as in transformers' `output_hidden_states`: the last one's states are after the final norm.
    Goes through `model(...)`, so that DDP and FSDP hooks run.
    """
    inner, at, positions = extract_model_from_parallel(model), batch["predicted_at"], batch["position_ids"]
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 3:
        mask = prefix_tree.additive_masks(inner, mask, positions)
    # transformers' `logits_to_keep` leaves the head the same columns of all rows; this, the labelled positions of each
    with inner.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1)[at],)):
        output = model(
            input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions, use_cache=False,
            output_hidden_states=bool(hidden_layers),
        )  # fmt: skip
    hidden = {layer: output.hidden_states[layer].flatten(0, 1)[at].float() for layer in hidden_layers}
    return Predicted(output.logits.float(), batch["labels"], hidden)


def predicted_logits(model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, vocab_size) and targets (N,) at the N labelled positions."""
    predicted = predict(model, batch)
    return predicted.logits, predicted.targets


@torch.inference_mode()
def iterate_predicted(
    model: nn.Module, examples: Sequence[Example], batch_tokens: int = 512, hidden_layers: Sequence[int] = ()
) -> Iterator[tuple[list[int], Predicted]]:
    """Batches of examples that begin alike: their numbers, and what the model says at their positions, in order."""
    share = prefix_tree.takes_branches(model)
    for rows in cut(examples, batch_tokens, share):
        batch = pack([examples[i] for i in rows], share)
        yield rows, predict(model, {name: tensor.to(model.device) for name, tensor in batch.items()}, hidden_layers)


def collect_logits(model: nn.Module, examples: Sequence[Example]) -> torch.Tensor:
    """Logits (N, vocab_size) of all predicted positions on the CPU; the same order for every model."""
    return torch.cat([found.logits.cpu() for _, found in iterate_predicted(model, examples)])


def collect_nll(model: nn.Module, examples: Sequence[Example]) -> list[float]:
    """Mean −log p of each example's predicted tokens, in nats: one number per example, for paired comparisons."""
    model.eval()
    found = [0.0] * len(examples)
    for rows, predicted in iterate_predicted(model, examples):
        for row, nll in zip(rows, mean_nll(predicted, [examples[i] for i in rows]), strict=True):
            found[row] = nll
    return found


def mean_nll(predicted: Predicted, examples: Sequence[Example]) -> list[float]:
    """Mean −log p of each example's predicted tokens, in nats; `predicted` is what a model says of these examples."""
    nll = nn.functional.cross_entropy(predicted.logits, predicted.targets, reduction="none")
    return [part.mean().item() for part in nll.split([example.num_predicted for example in examples])]


def measure_drift(before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    """What was done to logits (N, V): mean KL(before ‖ after) in nats, largest change, share of changed top tokens."""
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    return {
        "positions": len(before),
        "kl_nats": (p.exp() * (p - q)).sum(-1).mean().item(),
        "max_abs_logit": (before - after).abs().max().item(),
        "top1_changed": (before.argmax(-1) != after.argmax(-1)).float().mean().item(),
    }
