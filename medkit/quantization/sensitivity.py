"""What quantising each module alone does to a model, on questions that may be learned from.

Damage is the mean KL(reference ‖ quantised) of next-token distributions at the predicted positions, in nats. For small
changes it is half the mean squared slope of the log-probability of tokens that the model itself draws, along the change
of the weights (the Fisher information): one forward and one backward pass tell it for every module of the layers at
once, where a run per module would take hours. Embeddings and head have runs of their own: what is changed there is no
small change (the estimate for tied ones in NF4 was 0.026 nats, a run found 0.045), and they are few and the largest.
Nothing here chooses a plan (`plans` does), and damages that were measured alone add up only approximately:
`measure_plans` puts their sum beside the joint damage of whole runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from medkit.modeling import batches as batching
from medkit.modeling.batches import Example
from medkit.quantization import gptq, memory_ledger, quantize, rowwise
from medkit.quantization.plans import Plan, Scheme, layer_of


@contextmanager
def fake_quantized(
    model: nn.Module, schemes: Mapping[str, Scheme], double_quant: bool, calibration: Sequence[Example] = ()
) -> Iterator[None]:
    """Within the block the named modules multiply with weights that went through their scheme; bytes do not change.

    NF4 is rounded to the nearest level, or to fit the examples of `calibration`.
    """
    fitted = gptq.calibrate(model, schemes, calibration, double_quant) if calibration else {}
    modules = {name: model.get_submodule(name) for name in schemes}
    exact = {name: module.weight.data for name, module in modules.items()}
    try:
        for name, module in modules.items():
            if name in fitted:
                module.weight.data = rowwise.dequantize_nf4(fitted[name])
            else:
                module.weight.data = rowwise.fake_quantize(exact[name], schemes[name], double_quant)
        yield
    finally:
        for name, module in modules.items():
            module.weight.data = exact[name]


def measure_sensitivity(
    model: nn.Module,
    examples: Sequence[Example],
    pad_token_id: int,
    double_quant: bool,
    schemes: Sequence[Scheme] = ("int8", "nf4"),
    batch_tokens: int = 1024,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per module and scheme: `module`, `layer` (<NA> at the ends), `kind`, `scheme`, `kl_nats`, `bytes`.

    `keep` is among the rows, with no damage and the bytes of bf16, so that the table holds all choices of a budget; a
    scheme that a module's shape does not allow is not. Rounding is to the nearest level. At the ends it is measured by
    whole runs, in the layers estimated: of n examples that are alike the standard error is √(2 / n) of the estimate,
    and damages above some 0.1 nats come out too large or small.
    """
    shapes = quantize.weight_shapes(model)
    choices = [(m, s) for m in shapes for s in schemes if s != "nf4" or quantize.can_be_nf4(shapes[m])]
    generator = torch.Generator(model.device).manual_seed(seed)
    inside = [(module, scheme) for module, scheme in choices if layer_of(module) is not None]
    squares, positions = dict.fromkeys(inside, 0.0), 0
    batches = list(_batches(model, examples, pad_token_id, batch_tokens))
    with _frozen(model):
        for batch in tqdm(batches, desc="sensitivity", unit="batch", delay=2, mininterval=10):
            for choice, slopes in _slopes(model, batch, inside, double_quant, generator).items():
                squares[choice] += slopes.square().sum().item()
            positions += len(batch["labels"])
    damages = {choice: square / (2 * positions) for choice, square in squares.items()}
    exact = batching.collect_logits(model, examples)
    for module, scheme in [choice for choice in choices if choice not in damages]:
        with fake_quantized(model, {module: scheme}, double_quant):
            found = batching.measure_drift(exact, batching.collect_logits(model, examples))
        damages[module, scheme] = found["kl_nats"]
    weights = {weight.module: weight for weight in memory_ledger.model_shapes(model.config) if len(weight.shape) == 2}
    rows = []
    for module, scheme in [
        (m, s) for m in shapes for s in ("unquantized", *schemes) if s == "unquantized" or (m, s) in damages
    ]:
        damage = damages.get((module, scheme), 0.0)
        alone = memory_ledger.plan_bytes([weights[module]], {module: scheme}, double_quant=double_quant)
        size = int(alone.bytes.sum())
        rows.append((module, layer_of(module), module.rsplit(".", 1)[-1], scheme, damage, size))
    table = pd.DataFrame(rows, columns=["module", "layer", "kind", "scheme", "kl_nats", "bytes"])
    return table.astype({"layer": "Int64"})


@torch.no_grad()
def measure_plans(
    model: nn.Module,
    examples: Sequence[Example],
    double_quant: bool,
    candidates: Sequence[Plan],
    sensitivity: pd.DataFrame,
    calibration: Sequence[Example] = (),
) -> pd.DataFrame:
    """One row per plan: `plan`, `kl_nats` of the whole plan (simulated), `top1_changed`, `summed_kl_nats`, `bytes`.

    `summed_kl_nats` adds up what its modules did alone, by a table of `measure_sensitivity`. On the examples of that
    table the two columns show how additive damage is; on others, whether a choice carries over. With `calibration`,
    NF4 is rounded to fit its examples, and the sum, which is of plain rounding, says what that is worth.
    """
    alone = sensitivity.set_index(["module", "scheme"])
    exact, rows = batching.collect_logits(model, examples), []
    for plan in tqdm(candidates, desc="plans", unit="plan", delay=2, mininterval=10):
        with fake_quantized(model, plan.schemes, double_quant, calibration):
            drift = batching.measure_drift(exact, batching.collect_logits(model, examples))
        taken = alone.loc[list(plan.schemes.items())]
        rows.append((plan.name, drift["kl_nats"], drift["top1_changed"], taken.kl_nats.sum(), int(taken.bytes.sum())))
    return pd.DataFrame(rows, columns=["plan", "kl_nats", "top1_changed", "summed_kl_nats", "bytes"])


def _batches(model, examples, pad_token_id, batch_tokens) -> Iterator[dict[str, torch.Tensor]]:
    for rows in batching.bucket_by_length([len(e.input_ids) for e in examples], batch_tokens):
        batch = batching.collate([examples[i] for i in rows], pad_token_id)
        yield {name: tensor.to(model.device) for name, tensor in batch.items()}


def _slopes(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    choices: Sequence[tuple[str, Scheme]],
    double_quant: bool,
    generator: torch.Generator,
) -> dict[tuple[str, Scheme], torch.Tensor]:
    """(module, scheme) → (examples,): slope of the log-probability of drawn tokens along what the scheme changes.

    For linear layers of the decoder: gradients are followed no further back than to its embedded input.
    Tokens are drawn at each predicted position of an example on its own, so slopes of two positions are uncorrelated:
    the square of their sum is, on average, the sum of their squares.
    """
    slopes: dict[tuple[str, Scheme], torch.Tensor] = {}

    def begin(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        output.requires_grad_()

    def watch(name: str, module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: measure(name, module.weight.detach(), args[0].detach(), gradient))

    def measure(name: str, weight: torch.Tensor, read: torch.Tensor, gradient: torch.Tensor) -> None:
        for scheme in [scheme for choice, scheme in choices if choice == name]:
            moved = nn.functional.linear(read, rowwise.fake_quantize(weight, scheme, double_quant) - weight)
            slopes[name, scheme] = (gradient * moved).sum(-1).float().sum(1)  # (B, L, rows) → (B,)

    with ExitStack() as hooks, torch.enable_grad():
        hooks.callback(model.get_input_embeddings().register_forward_hook(begin).remove)
        for name in dict.fromkeys(name for name, _ in choices):
            hooks.callback(model.get_submodule(name).register_forward_hook(partial(watch, name)).remove)
        logits, _ = batching.predicted_logits(model, batch)
        logprobs = logits.log_softmax(-1)
        drawn = torch.multinomial(logprobs.detach().exp(), 1, generator=generator)
        logprobs.gather(1, drawn).sum().backward()
    return slopes


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within the block no gradient of a weight is computed: only what passes through them is wanted."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_()
