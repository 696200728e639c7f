"""Teacher signals, their cache on disk, the loss that learns from them, and the pruned student.

Offline distillation: the teacher speaks once, its top-k log-probabilities are kept, and no teacher is in memory while
the student learns. Nothing here trains: the loss goes to `training.train`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from medkit.batching import Example, collect_nll, iterate_predictions
from medkit.outputs import atomic_path
from medkit.params import digest
from medkit.training import cross_entropy

INDEX = "signals.json"
FLOOR = 1e-6


class SignalsError(RuntimeError):
    """A signal cache that does not belong to these examples or this teacher."""


# --- signals -------------------------------------------------------------------------------------------------------


def top_k_logprobs(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and log-probabilities (N, k) of the k likeliest tokens, after the softmax over the whole vocabulary."""
    logprobs, ids = logits.log_softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
    return ids, logprobs


def capture_signals(
    model: nn.Module,
    examples: Sequence[Example],
    folder: Path,
    k: int,
    shard_examples: int,
    pad_token_id: int,
    key: str,
) -> dict:
    """Write the teacher's top-k log-probabilities at every predicted position; returns the index.

    Shards of `shard_examples` examples are written whole, in order, and skipped if they are there: a killed capture
    goes on. `key` says what spoke (teacher, template, tokenizer); a cache with another key, other examples or another
    k is begun anew. Stored as fp16 log-probabilities and int32 ids.
    """
    index = {
        "key": key,
        "examples": digest([(e.input_ids, e.loss_start) for e in examples]),
        "top_k": k,
        "shard_examples": shard_examples,
        "num_examples": len(examples),
        "num_positions": sum(e.num_predicted for e in examples),
    }
    folder.mkdir(parents=True, exist_ok=True)
    if _read_index(folder) != index:
        for stale in folder.iterdir():
            stale.unlink()
        with atomic_path(folder / INDEX) as scratch:
            scratch.write_text(json.dumps(index, indent=1))
    starts = range(0, len(examples), shard_examples)
    for number, start in enumerate(tqdm(starts, desc="capturing signals", unit="shard", delay=2, mininterval=10)):
        path = folder / f"{number:05d}.safetensors"
        if not path.exists():
            shard = _capture_shard(model, examples[start : start + shard_examples], k, pad_token_id)
            with atomic_path(path) as scratch:
                save_file(shard, scratch)
    return index


def _capture_shard(model: nn.Module, examples: Sequence[Example], k: int, pad_token_id: int) -> dict[str, torch.Tensor]:
    offsets = torch.tensor([0, *(e.num_predicted for e in examples)]).cumsum(0)
    k = min(k, model.config.get_text_config().vocab_size)
    ids = torch.empty(int(offsets[-1]), k, dtype=torch.int32)
    logprobs = torch.empty(int(offsets[-1]), k, dtype=torch.float16)
    for rows, logits, _ in iterate_predictions(model, examples, pad_token_id):
        found = top_k_logprobs(logits, k)
        positions = torch.cat([torch.arange(offsets[i], offsets[i + 1]) for i in rows])
        ids[positions], logprobs[positions] = found[0].to("cpu", torch.int32), found[1].to("cpu", torch.float16)
    return {"offsets": offsets, "ids": ids, "logprobs": logprobs}


def _read_index(folder: Path) -> dict:
    path = folder / INDEX
    return json.loads(path.read_text()) if path.exists() else {}


class Signals:
    """Reader of a signal cache: per-example teacher log-probabilities, joined for a batch."""

    def __init__(self, folder: Path, key: str):
        self.index = _read_index(folder)
        if self.index.get("key") != key:
            raise SignalsError(
                f"{folder}: signals of {self.index.get('key')!r}, the run wants {key!r}; "
                f"capture them again with this teacher, template and tokenizer"
            )
        wanted = -(-self.index["num_examples"] // self.index["shard_examples"])
        missing = [n for n in range(wanted) if not (folder / f"{n:05d}.safetensors").is_file()]
        if missing:
            raise SignalsError(f"{folder}: shards {missing[:3]} of {wanted} are missing; run capture_signals again")
        self.shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]

    def example(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (int64) and log-probabilities (float32) of one example, each (positions, k)."""
        shard = self.shards[number // self.index["shard_examples"]]
        row = number % self.index["shard_examples"]
        where = slice(int(shard["offsets"][row]), int(shard["offsets"][row + 1]))
        return shard["ids"][where].long(), shard["logprobs"][where].float()

    def batch(self, numbers: list[int]) -> dict[str, torch.Tensor]:
        """Signals of a batch, flattened in the order of its labelled positions: (N, k) each."""
        found = [self.example(number) for number in numbers]
        return {"teacher_ids": torch.cat([f[0] for f in found]), "teacher_logprobs": torch.cat([f[1] for f in found])}


# --- losses --------------------------------------------------------------------------------------------------------


def sparse_kl(
    logits: torch.Tensor, teacher_ids: torch.Tensor, teacher_logprobs: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """KL(teacher ‖ student) per position in nats, shape (N,), over the k kept tokens and one tail bucket.

    logits (N, V); teacher_ids, teacher_logprobs (N, k), the log-probabilities at temperature 1. With k = V this is the
    dense KL; it is 0 iff the teacher's kept probabilities and tail mass equal the student's, at any temperature: both
    tails count as even over their V − k tokens when they are tempered. At temperature 1 it is never above the dense
    KL: merging tokens into a bucket can only lower it (data-processing inequality).
    """
    rest = logits.shape[-1] - teacher_ids.shape[-1]
    student = logits.log_softmax(-1)
    student_kept, teacher_kept = student.gather(-1, teacher_ids), teacher_logprobs
    if rest:
        # rounding blurs what the kept tokens leave, and can leave nothing: both tails get a millionth more
        teacher_tail = ((-torch.expm1(teacher_logprobs.logsumexp(-1, keepdim=True))).clamp(min=0) + FLOOR).log()
        student_tail = student.scatter(-1, teacher_ids, -torch.inf).logsumexp(-1, keepdim=True).exp().add(FLOOR).log()
        teacher_kept = torch.cat([teacher_kept, teacher_tail], -1)
        student_kept = torch.cat([student_kept, student_tail], -1)
    p, q = (_temper(buckets, rest, temperature) for buckets in (teacher_kept, student_kept))
    return (p.exp() * (p - q)).sum(-1)


def _temper(buckets: torch.Tensor, rest: int, temperature: float) -> torch.Tensor:
    """Log-probabilities at a temperature; the last is of a bucket of `rest` tokens, counted as even (0: no bucket)."""
    spread = torch.zeros_like(buckets)
    if rest:
        spread[:, -1] = math.log(rest)
    return ((buckets - spread) / temperature + spread).log_softmax(-1)


def make_kd_loss(ce_weight: float, kl_weight: float, temperature: float) -> Callable:
    """The loss λ1·CE + λ2·T²·KL (arXiv 2505.00025, eq. 6, first two terms; T² after arXiv 1503.02531)."""

    def loss(logits: torch.Tensor, targets: torch.Tensor, extras: dict):
        ce, terms = cross_entropy(logits, targets, extras)
        kl = sparse_kl(logits, extras["teacher_ids"], extras["teacher_logprobs"], temperature).sum()
        return ce_weight * ce + kl_weight * temperature**2 * kl, {**terms, "kl": kl.detach()}

    loss.__qualname__ = f"kd_loss({ce_weight}, {kl_weight}, {temperature})"  # its settings, for `training.train`
    return loss


def check_same_vocabulary(teacher_tokenizer, student_tokenizer) -> None:
    """Raise SignalsError unless every token has the same id in both: only then do token ids mean the same."""
    teacher, student = teacher_tokenizer.get_vocab(), student_tokenizer.get_vocab()
    if teacher != student:
        odd = next(iter(teacher.items() ^ student.items()))
        raise SignalsError(
            f"teacher and student have different tokenizers (e.g. {odd}): KL over token ids is not defined "
            f"between them; choose a pair with one vocabulary"
        )


# --- students ------------------------------------------------------------------------------------------------------


def measure_layer_importance(model: nn.Module, examples: Sequence[Example], pad_token_id: int) -> list[float]:
    """What each decoder layer is worth: rise of the mean answer NLL (nats per token) when it alone is skipped."""
    layers = model.get_decoder().layers
    full = np.mean(collect_nll(model, examples, pad_token_id))
    importance = []
    for layer in tqdm(list(layers), desc="layer importance", unit="layer", delay=2, mininterval=10):
        layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
        try:
            importance.append(float(np.mean(collect_nll(model, examples, pad_token_id)) - full))
        finally:
            del layer.forward  # the class's own again
    return importance


def choose_layers(importance: Sequence[float], num_layers: int) -> list[int]:
    """The `num_layers` most important layers, in order. Raises ValueError if there are fewer."""
    if num_layers > len(importance):
        raise ValueError(f"distillation.num_layers is {num_layers}, the model has {len(importance)}")
    best = sorted(range(len(importance)), key=lambda i: importance[i], reverse=True)[:num_layers]
    return sorted(best)
