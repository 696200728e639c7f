"""What quantising each module alone does to a model, on questions that may be learned from.

Damage is the mean KL(reference ‖ quantised) of next-token distributions at the predicted positions, in nats. Quantised
weights are simulated (`rowwise.round_trip`), one module at a time, and a module in layer l runs only from layer l
on: what the layers before it give is kept from one reference pass. Nothing here chooses a plan (`plans` does), and
damages that were measured alone add up only approximately: `measure_plans` puts their sum beside the joint damage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from medkit import batching, ledger, quantization, rowwise
from medkit.batching import Example
from medkit.plans import Plan, Scheme, layer_of


@dataclass(frozen=True)
class _Batch:
    """A batch with what the unchanged model makes of it."""

    inputs: dict[str, torch.Tensor]
    entering: list[torch.Tensor]
    """The hidden states that enter each decoder layer, last what leaves the decoder, (batch, length, hidden)."""
    logprobs: torch.Tensor
    """(positions, vocabulary)"""


@contextmanager
def rounded(model: nn.Module, schemes: Mapping[str, Scheme], double_quant: bool) -> Iterator[None]:
    """Within the block the named modules multiply with weights that went through their scheme; bytes do not change."""
    modules = {name: model.get_submodule(name) for name in schemes}
    exact = {name: module.weight.data for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.weight.data = rowwise.round_trip(exact[name], schemes[name], double_quant)
        yield
    finally:
        for name, module in modules.items():
            module.weight.data = exact[name]


@torch.no_grad()
def measure_sensitivity(
    model: nn.Module,
    examples: Sequence[Example],
    pad_token_id: int,
    double_quant: bool,
    schemes: Sequence[Scheme] = ("int8", "nf4"),
    batch_tokens: int = 1024,
) -> pd.DataFrame:
    """One row per module and scheme: `module`, `layer` (<NA> at the ends), `kind`, `scheme`, `kl_nats`, `bytes`.

    `keep` is among the rows, with no damage and the bytes of bf16, so that the table holds all choices of a budget; a
    scheme that a module's shape does not allow is not. Memory: every layer's hidden states of all examples.
    """
    batches = [_reference(model, batch) for batch in _batches(model, examples, pad_token_id, batch_tokens)]
    shapes = quantization.weight_shapes(model)
    weights = {weight.module: weight for weight in ledger.model_shapes(model.config) if len(weight.shape) == 2}
    rows = []
    for module in tqdm(shapes, desc="sensitivity", unit="module", delay=2, mininterval=10):
        for scheme in ("keep", *schemes):
            if scheme == "nf4" and not quantization.can_be_nf4(shapes[module]):
                continue
            damage = 0.0 if scheme == "keep" else _damage(model, batches, module, scheme, double_quant)
            alone = ledger.plan_bytes([weights[module]], {module: scheme}, double_quant=double_quant)
            size = int(alone.bytes.sum())
            rows.append((module, layer_of(module), module.rsplit(".", 1)[-1], scheme, damage, size))
    table = pd.DataFrame(rows, columns=["module", "layer", "kind", "scheme", "kl_nats", "bytes"])
    return table.astype({"layer": "Int64"})


@torch.no_grad()
def measure_plans(
    model: nn.Module,
    examples: Sequence[Example],
    pad_token_id: int,
    double_quant: bool,
    candidates: Sequence[Plan],
    sensitivity: pd.DataFrame,
) -> pd.DataFrame:
    """One row per plan: `plan`, `kl_nats` of the whole plan (simulated), `top1_changed`, `summed_kl_nats`, `bytes`.

    `summed_kl_nats` adds up what its modules did alone, by a table of `measure_sensitivity`. On the examples of that
    table the two columns show how additive damage is; on others, whether a choice carries over.
    """
    alone = sensitivity.set_index(["module", "scheme"])
    exact, rows = batching.collect_logits(model, examples, pad_token_id), []
    for plan in tqdm(candidates, desc="plans", unit="plan", delay=2, mininterval=10):
        with rounded(model, plan.schemes, double_quant):
            drift = batching.measure_drift(exact, batching.collect_logits(model, examples, pad_token_id))
        taken = alone.loc[list(plan.schemes.items())]
        rows.append((plan.name, drift["kl_nats"], drift["top1_changed"], taken.kl_nats.sum(), int(taken.bytes.sum())))
    return pd.DataFrame(rows, columns=["plan", "kl_nats", "top1_changed", "summed_kl_nats", "bytes"])


@contextmanager
def _resumed(layers: Sequence[nn.Module], start: int, entering: Sequence[torch.Tensor]) -> Iterator[None]:
    """Within the block the model's own forward pass does not run the layers before `start`: it takes what they gave."""
    try:
        for layer in layers[:start]:
            layer.forward = lambda hidden_states, *args, **kwargs: entering[start]
        yield
    finally:
        for layer in layers[:start]:
            vars(layer).pop("forward", None)  # the class's own again


def _batches(model, examples, pad_token_id, batch_tokens) -> Iterator[dict[str, torch.Tensor]]:
    for rows in batching.bucket_by_length([len(e.input_ids) for e in examples], batch_tokens):
        batch = batching.collate([examples[i] for i in rows], pad_token_id)
        yield {name: tensor.to(model.device) for name, tensor in batch.items()}


def _reference(model: nn.Module, inputs: dict[str, torch.Tensor]) -> _Batch:
    entering: list[torch.Tensor] = []
    with ExitStack() as hooks:
        for layer in model.get_decoder().layers:
            hook = layer.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
            hooks.callback(hook.remove)
        hooks.callback(layer.register_forward_hook(lambda _, args, output: entering.append(output)).remove)
        logits, _ = batching.predicted_logits(model, inputs)
    return _Batch(inputs, entering, logits.log_softmax(-1))


def _damage(model: nn.Module, batches: list[_Batch], module: str, scheme: Scheme, double_quant: bool) -> float:
    """Mean KL in nats over all predicted positions."""
    start = layer_of(module)
    layers = list(model.get_decoder().layers)
    if start is None:  # a head of its own needs no layer, embeddings need all of them
        head = model.get_submodule(module) is not model.get_input_embeddings()
        start = len(layers) if head else 0
    total, positions = 0.0, 0
    with rounded(model, {module: scheme}, double_quant):
        for batch in batches:
            with _resumed(layers, start, batch.entering):
                after = batching.predicted_logits(model, batch.inputs)[0].log_softmax(-1)
            total += (batch.logprobs.exp() * (batch.logprobs - after)).sum().item()
            positions += len(after)
    return total / positions
