"""The teacher cache: a teacher's top-k log-probabilities, written to disk once and read back while a student trains.

At each predicted position the k most likely tokens are kept, with log-probabilities after the softmax over the whole
vocabulary, and the log-probability of the target token. A cache is some shards (safetensors) and `index.json`, which
holds the settings and the sha256 of each shard. Bytes per position at k = 64: 128 for log-probabilities in fp16, 8 for
each bit of a token id (16 bits up to 65,536 tokens, 18 up to 262,144), and 2 for the target token: 258 to 274 bytes.
Each layer of hidden states adds 2 bytes per unit.
"""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import nn
from tqdm import tqdm

from medkit.modeling.batches import Example, iterate_predicted
from medkit.params import digest
from medkit.stage import MedkitError, atomic_path, sha256_of, write_text

INDEX, SHARD = "index.json", "{:05d}.safetensors"
OPEN_SHARDS = 4  # most shards that a reader keeps open


def top_k_logprobs(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and log-probabilities (N, k) of the k most likely tokens, after the softmax over the whole vocabulary."""
    logprobs, ids = logits.log_softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
    return ids, logprobs


def capture_teacher(
    load_teacher: Callable[[], nn.Module],
    examples: Sequence[Example],
    folder: Path,
    top_k: int,
    shard_examples: int,
    key: str,
    hidden_layers: Sequence[int] = (),
) -> "TeacherCache":
    """Run a teacher over the examples, write its cache to `folder`, and return the reader of it.

    The teacher is loaded if a shard is missing, not for a whole cache. `hidden_layers` count as in transformers'
    `output_hidden_states`. Each shard holds `shard_examples` examples.
    Undamaged shards are kept, so a killed capture goes on. `key` identifies the teacher, the template and the
    tokenizer: if it or another setting differs from the index, the shards of that index are removed. Other files in the
    folder are left alone. Raises MedkitError for values beyond the range of fp16.
    """
    index = read_index(folder)
    teacher = None if index.get("key") == key else load_teacher()  # a key is of one teacher, so of one vocabulary
    vocab_size = index["vocab_size"] if teacher is None else teacher.config.get_text_config().vocab_size
    settings = {
        "key": key,
        "examples": _digest_examples(examples),
        "top_k": min(top_k, vocab_size),
        "vocab_size": vocab_size,
        "hidden_layers": list(hidden_layers),
        "shard_examples": shard_examples,
        "num_examples": len(examples),
        "num_positions": sum(e.num_predicted for e in examples),
    }
    checksums = index.pop("sha256", {})
    if index != settings:
        for name in checksums:
            (folder / name).unlink(missing_ok=True)
        checksums = {}
        write_text(folder / INDEX, json.dumps({**settings, "sha256": checksums}, indent=1))
    starts = range(0, len(examples), shard_examples)
    for start in tqdm(starts, desc="capturing the teacher", unit="shard", delay=2, mininterval=10):
        path = folder / SHARD.format(start // shard_examples)
        if path.is_file() and sha256_of(path) == checksums.get(path.name):
            continue
        teacher = load_teacher() if teacher is None else teacher
        part = examples[start : start + shard_examples]
        arrays = _run_model(teacher, part, settings["top_k"], hidden_layers)
        with atomic_path(path) as scratch:
            save_file(_pack(arrays, [e.num_predicted for e in part], vocab_size), scratch)
        checksums[path.name] = sha256_of(path)  # after the shard: if killed between the two, the shard does not count
        write_text(folder / INDEX, json.dumps({**settings, "sha256": checksums}, indent=1))
    return TeacherCache(folder, key, examples)


def _digest_examples(examples: Sequence[Example]) -> str:
    return digest([(e.input_ids, e.loss_start) for e in examples])


def _run_model(
    model: nn.Module, examples: Sequence[Example], top_k: int, hidden_layers: Sequence[int]
) -> dict[str, np.ndarray]:
    """Arrays over the predicted positions of the examples, in their order."""
    offsets = np.cumsum([0, *(e.num_predicted for e in examples)])
    arrays: dict[str, np.ndarray] = {}
    for rows, predicted in iterate_predicted(model, examples, hidden_layers=hidden_layers):
        ids, logprobs = top_k_logprobs(predicted.logits, top_k)
        target = -nn.functional.cross_entropy(predicted.logits, predicted.targets, reduction="none")
        tensors = {"ids": ids, "logprobs": logprobs, "target_logprobs": target}
        tensors |= {f"hidden_{layer}": states for layer, states in predicted.hidden.items()}
        positions = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in rows])
        for name, tensor in tensors.items():
            values = tensor.cpu().numpy()
            arrays.setdefault(name, np.empty((offsets[-1], *values.shape[1:]), values.dtype))[positions] = values
    return arrays


def read_index(folder: Path) -> dict:
    """The settings of a cache, and under `sha256` the checksum of each shard by file name; empty if there is none."""
    try:
        return json.loads((folder / INDEX).read_text())
    except (FileNotFoundError, ValueError):  # not there, or damaged
        return {}


def _pack(arrays: dict[str, np.ndarray], counts: Sequence[int], vocab_size: int) -> dict[str, np.ndarray]:
    """A shard's arrays: ids as bits, values in fp16, and the first position of each example; `counts` by example."""
    packed = {"ids": pack_ids(arrays["ids"], vocab_size)}
    limit = float(np.finfo(np.float16).max)
    for name in arrays.keys() - {"ids"}:
        values = np.maximum(arrays[name], -limit) if name.endswith("logprobs") else arrays[name]
        if not (np.abs(values) <= limit).all():
            raise MedkitError(
                f"{name} of the teacher: values up to {np.abs(values).max():g}, but the largest fp16 number is "
                f"{limit:g}; remove this layer from distillation.hidden_layers, or check the teacher's weights"
            )
        packed[name] = values.astype(np.float16)
    return packed | {"offsets": np.cumsum([0, *counts], dtype=np.uint32)}


def pack_ids(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Ids (N, k) as bits, (N, ⌈k·bits/8⌉) uint8: as many for each id as the largest one needs."""
    bits, in_bytes = (vocab_size - 1).bit_length(), ids.astype("<u4")[..., None].view(np.uint8)
    each = np.unpackbits(in_bytes, axis=-1, count=bits, bitorder="little")
    return np.packbits(each.reshape(len(ids), ids.shape[1] * bits), axis=1)


def unpack_ids(packed: np.ndarray, k: int, vocab_size: int) -> np.ndarray:
    """Ids (N, k) int64, as they were before `pack_ids`."""
    bits = (vocab_size - 1).bit_length()
    each = np.unpackbits(packed, axis=1, count=k * bits).reshape(len(packed), k, bits)
    return each.astype(np.int64) @ (1 << np.arange(bits))


class TeacherCache:
    """Reader of a teacher cache by example number, in any order.

    Raises MedkitError for a cache of another teacher, template or tokenizer than `key`, for one of other examples, and
    for missing or damaged shards: now, and not in the middle of a training.
    """

    def __init__(self, folder: Path, key: str, examples: Sequence[Example]):
        self.index = read_index(folder)
        if self.index.get("key") != key:
            raise MedkitError(
                f"{folder}: the cache has key {self.index.get('key')!r}, this run needs {key!r}; capture the teacher "
                f"again with this teacher, template and tokenizer"
            )
        if self.index["examples"] != _digest_examples(examples):
            raise MedkitError(f"{folder}: the cache is of other rows than these; capture the teacher again")
        count = -(-self.index["num_examples"] // self.index["shard_examples"])
        self.shards = [folder / SHARD.format(number) for number in range(count)]
        for path in self.shards:
            if not path.is_file() or sha256_of(path) != self.index["sha256"].get(path.name):
                raise MedkitError(
                    f"{path} is missing or damaged; run the capture again: it writes this shard and keeps the others"
                )
        self._open = lru_cache(OPEN_SHARDS)(_open)  # in a random order shards are opened again and again

    @property
    def bytes_per_position(self) -> float:
        return sum(path.stat().st_size for path in self.shards) / self.index["num_positions"]

    def example(self, number: int) -> dict[str, torch.Tensor]:
        """The teacher at the P predicted positions of one example.

        `teacher_ids` (P, k) int64, `teacher_logprobs` (P, k) float32, most likely token first,
        `teacher_target_logprobs` (P,) float32, and for each captured layer n `teacher_hidden_n` (P, H) float32.
        """
        shard, row = divmod(number, self.index["shard_examples"])
        file, offsets = self._open(self.shards[shard])
        positions = slice(int(offsets[row]), int(offsets[row + 1]))
        arrays = {name: file.get_slice(name)[positions] for name in file.keys() if name != "offsets"}  # noqa: SIM118
        ids = unpack_ids(arrays.pop("ids"), self.index["top_k"], self.index["vocab_size"])
        values = {f"teacher_{name}": torch.from_numpy(array).float() for name, array in arrays.items()}
        return {"teacher_ids": torch.from_numpy(ids), **values}

    def batch(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        """The same for a batch, flattened in the order of its labelled positions: N of them."""
        examples = [self.example(number) for number in numbers]
        return {name: torch.cat([example[name] for example in examples]) for name in examples[0]}

    def mean_nll(self) -> list[float]:
        """The teacher's mean −log p of each example's target tokens, in nats."""
        numbers = range(self.index["num_examples"])
        return [-self.example(number)["teacher_target_logprobs"].mean().item() for number in numbers]


def _open(path: Path) -> tuple:
    """A mapped file, of which a slice reads only its own bytes, and the offsets of its examples."""
    file = safe_open(path, "numpy")
    return file, file.get_tensor("offsets")
