"""Questions → token sequences → padded batches → logits at the positions that are predicted, and nowhere else.

Training, signal capture and every comparison of two models go through these few functions, so a position means the same
in all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import pandas as pd
import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from medkit import prompts

IGNORE = -100


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
    template = prompts.pick_template(question["kind"], "option_text")
    messages = prompts.render(question, template)
    if question["answer"] >= 0:
        answer = prompts.answers(question, template)[question["answer"]]
        prompt_ids, answer_ids = prompts.encode(tokenizer, messages, answer)
        return Example([*prompt_ids, *answer_ids], len(prompt_ids))
    text_ids, _ = prompts.encode(tokenizer, messages)
    frame_ids, _ = prompts.encode(tokenizer, [messages[0], {"role": "user", "content": ""}])
    before = _shared(text_ids, frame_ids)
    after = _shared(text_ids[before:][::-1], frame_ids[before:][::-1])
    return Example(text_ids[: len(text_ids) - after], before)


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first elements two sequences have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


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


def group_by_prefix(prompts: Sequence[Sequence[int]], least_saved: int) -> list[tuple[int, list[int]]]:
    """Groups of indices, each with the number of first tokens its prompts share and may be read once; each index once.

    A group of its own saves reading at least `least_saved` (≥ 1) tokens beyond what all prompts share. What is left
    comes last, with a length of 0 if sharing saves less. Of every prompt at least one token is left after the start.
    """
    if not prompts:
        return []
    groups: list[tuple[int, list[int]]] = []

    def shared_by(members: list[int]) -> int:
        ends = prompts[members[0]], prompts[members[-1]]  # members are sorted: no two share less than these
        return min(_shared(*ends), min(len(prompts[i]) for i in members) - 1)

    def divide(members: list[int]) -> list[int]:
        """Make groups of what begins alike, the longest beginnings first; give back what is in none."""
        length, rest = shared_by(members), []
        for _, branch in groupby(members, key=lambda i: prompts[i][length]):
            alike = list(branch)
            rest += alike if len(alike) in (1, len(members)) else divide(alike)
        if (length - everywhere) * (len(rest) - 1) < least_saved:
            return rest
        groups.append((length, rest))
        return []

    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    everywhere = shared_by(order)
    if rest := divide(order):
        groups.append((everywhere if everywhere * (len(rest) - 1) >= least_saved else 0, rest))
    return groups


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch padded on the left, so that answers stand at the right edge and `labels` (B, K) needs only K columns."""
    length = max(len(e.input_ids) for e in examples)
    num_labels = max(e.num_predicted for e in examples)
    input_ids = torch.full((len(examples), length), pad_token_id)
    attention_mask = torch.zeros(len(examples), length, dtype=torch.long)
    labels = torch.full((len(examples), num_labels), IGNORE)
    for row, example in enumerate(examples):
        answer = example.input_ids[example.loss_start :]
        input_ids[row, length - len(example.input_ids) :] = torch.tensor(example.input_ids)
        attention_mask[row, length - len(example.input_ids) :] = 1
        labels[row, num_labels - len(answer) :] = torch.tensor(answer)
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, "labels": labels}


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
    mask = batch["labels"] != IGNORE
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}
    seen = mask.shape[1] + 1  # position i predicts token i + 1: the last one predicts nothing that is labelled
    predicting = nn.functional.pad(mask, (0, 1))
    head = extract_model_from_parallel(model).get_output_embeddings()
    # rows have answers of different lengths: `logits_to_keep` cuts columns, this leaves the labelled ones of each row
    with head.register_forward_pre_hook(lambda _, args: (args[0][predicting], *args[1:])):
        output = model(**inputs, use_cache=False, logits_to_keep=seen, output_hidden_states=bool(hidden_layers))
    hidden = {layer: output.hidden_states[layer][:, -seen:-1][mask].float() for layer in hidden_layers}
    return Predicted(output.logits.float(), batch["labels"][mask], hidden)


def predicted_logits(model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, vocab_size) and targets (N,) at the N labelled positions."""
    predicted = predict(model, batch)
    return predicted.logits, predicted.targets


@torch.inference_mode()
def iterate_predicted(
    model: nn.Module,
    examples: Sequence[Example],
    pad_token_id: int,
    batch_tokens: int = 1024,
    hidden_layers: Sequence[int] = (),
) -> Iterator[tuple[list[int], Predicted]]:
    """Batches of examples of like length: their numbers, and what the model says at their positions, in that order."""
    for rows in bucket_by_length([len(e.input_ids) for e in examples], batch_tokens):
        batch = collate([examples[i] for i in rows], pad_token_id)
        yield rows, predict(model, {name: tensor.to(model.device) for name, tensor in batch.items()}, hidden_layers)


def collect_logits(model: nn.Module, examples: Sequence[Example], pad_token_id: int) -> torch.Tensor:
    """Logits (N, vocab_size) of all predicted positions on the CPU; the same order for every model."""
    return torch.cat([found.logits.cpu() for _, found in iterate_predicted(model, examples, pad_token_id)])


def collect_nll(model: nn.Module, examples: Sequence[Example], pad_token_id: int) -> list[float]:
    """Mean −log p of each example's predicted tokens, in nats: one number per example, for paired comparisons."""
    model.eval()
    found = [0.0] * len(examples)
    for rows, predicted in iterate_predicted(model, examples, pad_token_id):
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
