"""Make a result once: what was trained or captured before is read back if its key is equal, and made again if not.

The key is one digest of all that can change the numbers: the settings, the inputs, the source of the functions that
compute, and the versions of the libraries. A record beside the result holds the key and the sizes of the files. So a
notebook goes on with what `accelerate launch -m medkit train` made, and a killed run with what it had finished.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, is_dataclass
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState, load_checkpoint_in_model
from accelerate.utils import broadcast_object_list
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import nn

from medkit.code_digest import digest_functions
from medkit.modeling import loading, trainer
from medkit.modeling.batches import Example
from medkit.modeling.trainer import Loss
from medkit.params import ModelsParams, Params, TrainParams, digest
from medkit.stage import Stage, atomic_path, library_versions, lock_run, write_text

ADAPTER_SETTINGS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")


# --- keys and records ---


def key_of(settings, inputs, *functions: Callable) -> str:
    """Digest of a result's settings and inputs (JSON values), of the functions that make it, and of the libraries.

    A function counts with everything in this package that it reaches. The build of a library (CPU or CUDA) is no part.
    """
    versions = {name: version and version.split("+")[0] for name, version in library_versions().items()}
    return digest([settings, inputs, digest_functions(*functions), versions])


def find_record(path: Path, key: str | None) -> dict | None:
    """The facts recorded with the file or folder `path`, if it was made under this key and is whole; else None.

    Of several processes the main one reads, and all get its answer; the others may give None as the key.
    """
    facts = None
    if PartialState().is_main_process and _record_path(path).is_file():
        record = json.loads(_record_path(path).read_text())
        if record["key"] == key and record["sizes"] == _file_sizes(path):
            facts = record["facts"]
    return broadcast_object_list([facts])[0]


@contextmanager
def recorded(path: Path, key: str, **facts) -> Iterator[None]:
    """Around the writing of `path`, in the main process: record that it was made under this key.

    The old record is removed first: after a kill between the two it would call the new files complete.
    """
    _record_path(path).unlink(missing_ok=True)
    yield
    record = {"key": key, "sizes": _file_sizes(path), "facts": facts}
    write_text(_record_path(path), json.dumps(record, indent=1) + "\n")


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.record.json")


def _file_sizes(path: Path) -> dict[str, int]:
    """Bytes of the file, or of each file in the folder: one that is lost or cut short is made again."""
    files = sorted(path.glob("*")) if path.is_dir() else [path] * path.is_file()
    return {file.name: file.stat().st_size for file in files}


# --- training ---


def load_for_training(folder: Path, models: ModelsParams, keep: Sequence[int] = (), adapter: bool = False) -> nn.Module:
    """A model whose weights can learn: in float32, because updates are smaller than bfloat16 can add.

    keep: the decoder layers to keep (empty: all). adapter: the weights stay as they are beside an adapter, so they are
    loaded in `models.dtype`. If the weights are to be sharded, they are loaded on the CPU.
    """
    changes = {} if adapter else {"dtype": "float32"}
    if trainer.is_sharded():
        device, dtype = loading.pick_device(models.device), changes.get("dtype", models.dtype)
        changes |= {"device": "cpu", "attention": loading.pick_attention(models.attention, device, dtype)[0]}
    return loading.load_model(folder, models.model_copy(update=changes), keep)


def train_once(
    stage: Stage,
    name: str,
    model: nn.Module,
    tokenizer,
    examples: Sequence[Example],
    section: TrainParams,
    loss: Loss,
    seed: int,
    half: bool = False,
    around: AbstractContextManager | None = None,
    **options,
) -> pd.DataFrame:
    """Train the model in place and save it as the stage's folder `name`, or read that back; returns the log.

    half: of `save_adapter`. around: entered for the training alone; what it adds to the model is not saved. options:
    `add_extras`, `difficulty` of `trainer.train`. A killed training goes on from its checkpoints; those under `name`
    that other settings left are removed.
    """
    is_main, folder, checkpoints = PartialState().is_main_process, stage.dir / name, stage.path(f"checkpoints/{name}")
    began = time.monotonic()
    # with FSDP the other processes do not have the weights yet
    key = training_key(model, examples, section, loss, seed, **options) if is_main else None
    (key,) = broadcast_object_list([key])
    if (facts := find_record(folder, key)) is not None:
        stage.started -= facts.get("duration_s", 0.0)  # so the manifest counts what is read back
        if is_main and isinstance(model, PeftModel):
            set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
        elif is_main:
            load_checkpoint_in_model(model, str(folder))
        return pd.DataFrame(facts["log"])
    if is_main:
        for stale in checkpoints.iterdir() if checkpoints.is_dir() else ():
            if stale.name != key:
                shutil.rmtree(stale)
    # checkpoints of shards cannot be read by a process that holds whole weights
    kind = "sharded" if trainer.is_sharded() else "whole"
    with around or nullcontext():
        log = trainer.train(model, examples, section, loss, checkpoints / key / kind, seed, **options)
    if is_main:
        stage.reopen()
        with recorded(folder, key, log=log.to_dict("records"), duration_s=time.monotonic() - began):
            if isinstance(model, PeftModel):
                save_adapter(model, folder, half)
            else:
                loading.save_model(model, tokenizer, folder)
    PartialState().wait_for_everyone()
    return log


def training_key(
    model: nn.Module,
    examples: Sequence[Example],
    section: TrainParams,
    loss: Loss,
    seed: int,
    add_extras: Callable[[list[int]], dict] | None = None,
    difficulty: Sequence[float] | None = None,
) -> str:
    """The key of a training. Of `add_extras` it takes what that returns for eight of the examples."""
    sample = list(range(0, len(examples), max(1, -(-len(examples) // 8))))
    extras = add_extras(sample) if add_extras else {}
    adapters = getattr(model, "peft_config", {})
    bf16 = loading.pick_bf16(section.bf16, trainer.training_device(model))
    settings = [
        [section.model_dump(exclude={"save_every_steps", "gradient_checkpointing"}) | {"bf16": bf16}, seed],
        repr(loss) if is_dataclass(loss) else loss.__qualname__,
        [[str(getattr(config, name)) for name in ADAPTER_SETTINGS] for config in adapters.values()],
    ]
    inputs = [
        [(name, _byte_sum(parameter)) for name, parameter in model.named_parameters()],
        [asdict(example) for example in examples],
        {name: _byte_sum(tensor) for name, tensor in extras.items()},
        None if difficulty is None else [float(number) for number in difficulty],
    ]
    loss_code = type(loss) if is_dataclass(loss) else loss
    return key_of(settings, inputs, trainer.train, loss_code, *([add_extras] if add_extras else []))


def _byte_sum(tensor: torch.Tensor) -> int:
    """The sum of a tensor's bytes: exact in any order of adding, and quick on a GPU."""
    return tensor.detach().contiguous().view(torch.uint8).sum(dtype=torch.int64).item()


def save_adapter(model: PeftModel, folder: Path, half: bool = False) -> Path:
    """Write the adapter alone (safetensors and its config), atomically; it fits the original base.

    half: A and B are stored in bfloat16, half the bytes; in the model they are rounded to what is stored, and stay in
    float32.
    """
    weights = model.state_dict()
    for name in [name for name in weights if half and ("lora_A" in name or "lora_B" in name)]:
        rounded = weights[name].bfloat16()
        weights[name].copy_(rounded)
        weights[name] = rounded
    with atomic_path(folder) as scratch:
        model.save_pretrained(scratch, save_embedding_layers=False, state_dict=weights)
    return folder


# --- the command line ---


@contextmanager
def open_stage(run: str, name: str, params: Params) -> Iterator[Stage]:
    """A stage of a run for `medkit train`; the main process locks the run (`lock_run`)."""
    state = PartialState(cpu=loading.pick_device(params.models.device).type == "cpu")
    with lock_run(run) if state.is_main_process else nullcontext():
        yield Stage(run, name)
        state.wait_for_everyone()
