"""A model that is too large for one device: its weights, gradients and optimiser shared out, and put together again.

FSDP2 and DeepSpeed do it, through the Trainer and accelerate; here is what they are asked for. What is trained, and
how, is for `training`.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import nn
from transformers import Trainer

from medkit.params import ScaleParams, TrainParams
from medkit.stage import MedkitError


class ShardingError(MedkitError):
    """A way of sharing that cannot be had here; the message names the cure."""


def is_sharded(section: TrainParams) -> bool:
    """Whether this process is one of several that share the weights."""
    return bool(section.scale and section.scale.sharding and int(os.environ.get("WORLD_SIZE", 1)) > 1)


def arguments(section: TrainParams) -> dict:
    """What to ask of TrainingArguments beside, or in place of, what a model that fits needs; nothing in one process.

    Raises ShardingError if the library is absent.
    """
    if not is_sharded(section):
        return {}
    return _fsdp(section.scale) if section.scale.sharding == "fsdp" else _zero3(section.scale)


def _fsdp(scale: ScaleParams) -> dict:
    """FSDP2; layers to wrap are those that transformers names for the architecture."""
    config = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT", "cpu_offload": scale.cpu_offload}
    config |= {"reshard_after_forward": True, "cpu_ram_efficient_loading": True}
    config |= {"activation_checkpointing": scale.gradient_checkpointing}
    return {"fsdp": True, "fsdp_config": config, "activation_checkpointing": False}


def _zero3(scale: ScaleParams) -> dict:
    """ZeRO-3 in float32, if need be under autocast: DeepSpeed's own bf16 would round the weights that are saved."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ShardingError("scale.sharding is deepspeed, but the package is absent: pip install -e '.[deepspeed]'")
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    if scale.cpu_offload:
        zero |= {part: {"device": "cpu"} for part in ("offload_optimizer", "offload_param")}
    sizes = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_clipping")  # the Trainer fills them in
    config = dict.fromkeys(sizes, "auto") | {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
    if scale.bf16:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return {"deepspeed": config, "bf16": False}


def gather(trainer: Trainer, model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Put whole weights on the CPU back into a sharded model, in the main process: fit for saving, not for running."""
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        for name, tensor in weights.items():  # one by one: load_state_dict would shard them again
            owner, _, leaf = name.rpartition(".")
            module, tensor = model.get_submodule(owner), tensor.to(dtypes.get(name, tensor.dtype))
            setattr(module, leaf, nn.Parameter(tensor) if leaf in module._parameters else tensor)
        model.tie_weights()
