"""What a signal cache is on disk: shards of packed arrays, and an index with the checksum of each.

A shard is a safetensors file. Per token at k = 64: 128 bytes of fp16 log-probabilities, 128 of the ids' low 16 bits,
8 for each higher bit an id of this vocabulary may have (none up to 65,536 tokens, 2 up to 262,144), and 2 for the
token that stands there: 258 to 274 bytes, and 2·H for each layer of hidden states. An example adds 4.
Who spoke, and who listens, is for `signals`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from medkit.sources import sha256_of
from medkit.stage import MedkitError, atomic_path

INDEX = "signals.json"
FORMAT = 3  # of the cache; one in another format is captured anew
LOW_BITS = 16


class SignalsError(MedkitError):
    """A signal cache that does not belong to these examples or this teacher, or cannot be captured or read."""


# --- arrays ----------------------------------------------------------------------------------------------------------


def _high_bits(vocab_size: int) -> int:
    """Bits that an id has beyond the low 16."""
    return max(0, (vocab_size - 1).bit_length() - LOW_BITS)


def pack_ids(ids: np.ndarray, vocab_size: int) -> dict[str, np.ndarray]:
    """Ids (N, k) as uint16 (N, k) and, where the vocabulary needs them, their higher bits (N, ⌈k·bits/8⌉) uint8."""
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise SignalsError(
            f"the teacher names token {ids.max()}, its vocabulary has {vocab_size}: give vocab_size as its number of "
            f"logits, padding included"
        )
    packed = {"ids_low": (ids & 0xFFFF).astype(np.uint16)}
    if bits := _high_bits(vocab_size):
        high = (ids[..., None] >> (LOW_BITS + np.arange(bits))) & 1
        packed["ids_high"] = np.packbits(high.reshape(len(ids), ids.shape[1] * bits).astype(np.uint8), axis=1)
    return packed


def unpack_ids(low: np.ndarray, high: np.ndarray | None, vocab_size: int) -> np.ndarray:
    """Ids (N, k) int64, as they were before `pack_ids`."""
    ids, bits = low.astype(np.int64), _high_bits(vocab_size)
    if bits and ids.size:
        each = np.unpackbits(high, axis=1, count=low.shape[1] * bits).reshape(*low.shape, bits)
        ids += each.astype(np.int64) @ (1 << (LOW_BITS + np.arange(bits)))
    return ids


def pack(said: dict[str, np.ndarray], counts: Sequence[int], vocab_size: int) -> dict[str, np.ndarray]:
    """A shard's arrays: `ids` as bits, the others in fp16, and where the examples of `counts` positions each begin.

    Raises SignalsError for what fp16 does not hold.
    """
    packed = pack_ids(said["ids"], vocab_size)
    limit = float(np.finfo(np.float16).max)
    for name in said.keys() - {"ids"}:
        values = np.maximum(said[name], -limit) if name.endswith("logprobs") else said[name]
        if not (np.abs(values) <= limit).all():
            raise SignalsError(
                f"{name} of the teacher reach {np.abs(values).max():g}, fp16 holds {limit:g}: leave that layer out, "
                f"or look at the teacher if it is not a number"
            )
        packed[name] = values.astype(np.float16)
    return packed | {"offsets": np.cumsum([0, *counts], dtype=np.uint32)}


# --- files -----------------------------------------------------------------------------------------------------------


def num_shards(index: dict) -> int:
    return -(-index["num_examples"] // index["shard_examples"])


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def read_index(folder: Path) -> dict:
    """What the cache was made of, and by file name the `sha256` of each shard that is there; empty if there is none."""
    try:
        return json.loads((folder / INDEX).read_text())
    except (FileNotFoundError, ValueError):  # never written, or damaged: then nothing in the folder can be trusted
        return {}


def write_index(folder: Path, index: dict) -> None:
    with atomic_path(folder / INDEX) as scratch:
        scratch.write_text(json.dumps(index, indent=1))


def write_shard(folder: Path, number: int, arrays: dict[str, np.ndarray], index: dict) -> dict:
    """Write a shard, then its checksum into the index, which is returned: a kill between the two leaves no shard."""
    path = shard_path(folder, number)
    with atomic_path(path) as scratch:
        save_file(arrays, scratch)
    known = index["sha256"]
    if known.get(path.name) != (sha256 := sha256_of(path)):
        index = {**index, "sha256": {**known, path.name: sha256}}
        write_index(folder, index)
    return index


class Shard:
    """One open file, mapped and not read: a slice costs the bytes of that slice."""

    def __init__(self, folder: Path, number: int):
        """Raises FileNotFoundError if it is not there, SignalsError if it is cut short."""
        path = shard_path(folder, number)
        try:
            self.file = safe_open(path, "numpy")
            self.offsets = self.file.get_tensor("offsets")
        except SafetensorError as error:
            raise _damaged(path, str(error)) from error
        self.names = [name for name in self.file.keys() if name != "offsets"]  # noqa: SIM118

    def example(self, row: int) -> dict[str, np.ndarray]:
        where = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        return {name: self.file.get_slice(name)[where] for name in self.names}


def check_shard(folder: Path, number: int, index: dict) -> None:
    """Read a whole file. Raises FileNotFoundError, and SignalsError for any bit that is not as it was written."""
    path = shard_path(folder, number)
    if sha256_of(path) != index["sha256"].get(path.name):
        raise _damaged(path, "its sha256 is not the one in the index")


def _damaged(path: Path, how: str) -> SignalsError:
    return SignalsError(
        f"{path} is damaged ({how}); run the capture again, it writes this shard anew and keeps the others"
    )
