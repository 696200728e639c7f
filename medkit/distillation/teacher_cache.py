"""The teacher's signals: what it says about every predicted token, kept on disk and read back while a student learns.

Offline distillation: the teacher speaks once, from memory or from a server, and is gone when the student learns. Of
each position the k likeliest tokens are kept, after the softmax over the whole vocabulary, and the token that stands
there. What that is on disk is for `shards`, which loss learns from it for `losses`. The tokens are the teacher's: a
student with another vocabulary hears them through `alignment`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from medkit.distillation.shards import (
    FORMAT,
    Shard,
    SignalsError,
    check_shard,
    num_shards,
    pack,
    read_index,
    shard_path,
    unpack_ids,
    write_index,
    write_shard,
)
from medkit.modeling.batches import Example, iterate_predicted
from medkit.modeling.engine import EngineError, PromptReader
from medkit.params import digest

MOST_OPEN = 4  # shards that a reader keeps open


def top_k_logprobs(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and log-probabilities (N, k) of the k likeliest tokens, after the softmax over the whole vocabulary."""
    logprobs, ids = logits.log_softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
    return ids, logprobs


# --- capture -------------------------------------------------------------------------------------------------------


def capture_signals(
    model: nn.Module,
    examples: Sequence[Example],
    folder: Path,
    k: int,
    shard_examples: int,
    key: str,
    hidden_layers: Sequence[int] = (),
) -> dict:
    """Write what a resident teacher says at every predicted position; returns the index.

    Shards of `shard_examples` examples are written whole, in order, and skipped if they are there and whole: a killed
    capture goes on. `key` says what spoke (teacher, template, tokenizer); a cache with another key, other examples or
    other numbers is begun anew. `hidden_layers` are indices into transformers' `output_hidden_states`, kept in fp16.
    Raises SignalsError for hidden states beyond the range of fp16.
    """
    vocab_size = model.config.get_text_config().vocab_size

    def speak(part: Sequence[Example]) -> dict[str, np.ndarray]:
        ends = np.cumsum([e.num_predicted for e in part])
        found: dict[str, np.ndarray] = {}
        for rows, predicted in iterate_predicted(model, part, hidden_layers=hidden_layers):
            ids, logprobs = top_k_logprobs(predicted.logits, k)
            target = -nn.functional.cross_entropy(predicted.logits, predicted.targets, reduction="none")
            said = {"ids": ids, "logprobs": logprobs, "target_logprobs": target}
            said |= {_hidden_name(layer): states for layer, states in predicted.hidden.items()}
            places = np.concatenate([np.arange(ends[i] - part[i].num_predicted, ends[i]) for i in rows])
            for name, tensor in said.items():
                values = tensor.cpu().numpy()
                found.setdefault(name, np.empty((ends[-1], *values.shape[1:]), values.dtype))[places] = values
        return found

    return _write_cache(examples, folder, _index(examples, k, shard_examples, key, vocab_size, hidden_layers), speak)


def capture_from_server(
    engine: PromptReader,
    examples: Sequence[Example],
    folder: Path,
    k: int,
    shard_examples: int,
    key: str,
    vocab_size: int,
    at_once: int = 16,
) -> dict:
    """The same cache, from a teacher behind a server: `engine` is a `RemoteEngine`, or another one that reads prompts.

    `vocab_size` is the teacher's number of logits, padding included. Up to `at_once` examples are asked about at a
    time, one shard at a time. Raises SignalsError if the server fails, or gives less than was asked for; shards that
    are whole stay, and the next call goes on after them.
    """

    def ask(example: Example) -> dict[str, list]:
        said = engine.prompt_logprobs(example.input_ids, k)
        where = slice(example.loss_start - 1, len(example.input_ids) - 1)  # what stands before a token says it
        names = {"ids": said.top_ids, "logprobs": said.top_logprobs, "target_logprobs": said.token_logprobs}
        return {name: values[where] for name, values in names.items()}

    def speak(part: Sequence[Example]) -> dict[str, np.ndarray]:
        with ThreadPoolExecutor(at_once) as pool:
            asked = [pool.submit(ask, example) for example in part]
            try:
                found = [answer.result() for answer in asked]
            except EngineError as error:
                raise SignalsError(
                    f"the teacher's server failed: {error}. Whole shards stay in {folder}; the same call goes on"
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)
        return {name: np.concatenate([np.asarray(one[name]) for one in found]) for name in found[0]}

    k = min(k, vocab_size)
    return _write_cache(examples, folder, _index(examples, k, shard_examples, key, vocab_size, ()), speak)


def _index(
    examples: Sequence[Example], k: int, shard_examples: int, key: str, vocab_size: int, hidden_layers: Sequence[int]
) -> dict:
    """What a cache must have been made of, to be gone on with."""
    return {
        "format": FORMAT,
        "key": key,
        "examples": digest([(e.input_ids, e.loss_start) for e in examples]),
        "top_k": min(k, vocab_size),
        "vocab_size": vocab_size,
        "hidden_layers": list(hidden_layers),
        "shard_examples": shard_examples,
        "num_examples": len(examples),
        "num_positions": sum(e.num_predicted for e in examples),
    }


def _write_cache(examples: Sequence[Example], folder: Path, wanted: dict, speak: Callable) -> dict:
    """`speak` maps a shard's examples to arrays over their predicted positions, in the order of the examples."""
    folder.mkdir(parents=True, exist_ok=True)
    index = read_index(folder)
    if {name: value for name, value in index.items() if name != "sha256"} != wanted:
        for stale in folder.iterdir():
            stale.unlink()
        index = {**wanted, "sha256": {}}
        write_index(folder, index)
    for number in tqdm(range(num_shards(index)), desc="capturing signals", unit="shard", delay=2, mininterval=10):
        try:
            check_shard(folder, number, index)
        except (FileNotFoundError, SignalsError):  # never written, or damaged
            part = examples[number * index["shard_examples"] : (number + 1) * index["shard_examples"]]
            arrays = pack(speak(part), [e.num_predicted for e in part], index["vocab_size"])
            index = write_shard(folder, number, arrays, index)
    return index


def _hidden_name(layer: int) -> str:
    return f"hidden_{layer}"


# --- reading ---------------------------------------------------------------------------------------------------------


class Signals:
    """Reader of a signal cache by example number, in any order; at most MOST_OPEN shards are open at a time.

    Raises SignalsError for signals of another teacher, template or tokenizer than `key` says, for a cache that is not
    whole, and for a shard that is cut short; for one with any other damage when it is first read.
    """

    def __init__(self, folder: Path, key: str):
        self.folder, self.index = folder, read_index(folder)
        if self.index.get("key") != key:
            raise SignalsError(
                f"{folder}: signals of {self.index.get('key')!r}, the run wants {key!r}; "
                f"capture them again with this teacher, template and tokenizer"
            )
        if self.index.get("format") != FORMAT:
            raise SignalsError(f"{folder}: signals in an older format; run capture_signals again")
        wanted = num_shards(self.index)
        missing = [n for n in range(wanted) if not shard_path(folder, n).is_file()]
        if missing:
            raise SignalsError(f"{folder}: shards {missing[:3]} of {wanted} are missing; run capture_signals again")
        for number in range(wanted):  # now, and not in the middle of a training
            Shard(folder, number)
        index, checked = self.index, set()

        def open_shard(number: int) -> Shard:
            if number not in checked:  # once: in a random order shards are opened again and again
                check_shard(folder, number, index)
                checked.add(number)
            return Shard(folder, number)

        self._shard = lru_cache(MOST_OPEN)(open_shard)

    def example(self, number: int) -> dict[str, torch.Tensor | dict[int, torch.Tensor]]:
        """What the teacher says at the P predicted positions of one example.

        `teacher_ids` (P, k) int64, `teacher_logprobs` (P, k) float32, the likeliest token first,
        `teacher_target_logprobs` (P,) float32 of the tokens that stand there, and `teacher_hidden`, layer → (P, H)
        float32, if any were captured.
        """
        shard, row = divmod(number, self.index["shard_examples"])
        said = self._shard(shard).example(row)
        ids = unpack_ids(said["ids_low"], said.get("ids_high"), self.index["vocab_size"])
        values = {name: torch.from_numpy(array).float() for name, array in said.items() if array.dtype == np.float16}
        found = {
            "teacher_ids": torch.from_numpy(ids),
            "teacher_logprobs": values["logprobs"],
            "teacher_target_logprobs": values["target_logprobs"],
        }
        layers = self.index["hidden_layers"]
        return found | ({"teacher_hidden": {layer: values[_hidden_name(layer)] for layer in layers}} if layers else {})

    def batch(self, numbers: Sequence[int]) -> dict[str, torch.Tensor | dict[int, torch.Tensor]]:
        """The same for a batch, flattened in the order of its labelled positions: N of them."""
        first, *_ = found = [self.example(number) for number in numbers]
        joined = {name: torch.cat([one[name] for one in found]) for name in first if name != "teacher_hidden"}
        if "teacher_hidden" in first:
            layers = self.index["hidden_layers"]
            joined["teacher_hidden"] = {n: torch.cat([one["teacher_hidden"][n] for one in found]) for n in layers}
        return joined

    def mean_nll(self) -> list[float]:
        """The teacher's mean −log p of each example's own tokens, in nats: how hard it finds them."""
        numbers = range(self.index["num_examples"])
        return [-self.example(number)["teacher_target_logprobs"].mean().item() for number in numbers]
