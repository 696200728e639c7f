"""Sensitivity: how much the predictions change when one module is quantized alone.

Sensitivity is the mean KL(unquantized ‖ quantized) of the next-token distributions at the predicted positions, in nats.
For a small change of the weights, KL is half the mean squared slope of the log-probability of tokens drawn from the
model, along the change (Fisher information). So one forward and one backward pass estimate all modules of the decoder
layers at once; one run per module would take hours. Embeddings and head are measured by whole runs, because their
change is not small: for tied embeddings in NF4 the estimate was 0.026 nats, and a run measured 0.045.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from medkit.modeling import batches as batching
from medkit.modeling.batches import Example
from medkit.quantization import memory_ledger, quantize, rowwise
from medkit.quantization.plans import SCHEMES, Plan, Scheme, layer_of

BATCH_TOKENS = 1024  # of a forward and backward pass


@contextmanager
def fake_quantized(model: nn.Module, schemes: Mapping[str, Scheme], double_quant: bool) -> Iterator[None]:
    """Inside the block the modules multiply with weights rounded to the nearest; the memory does not change."""
    exact = {name: model.get_submodule(name).weight.data for name in schemes}
    try:
        for name, weight in exact.items():
            rounded = rowwise.fake_quantize(weight, schemes[name], double_quant)
            model.get_submodule(name).weight.data = rounded
        yield
    finally:
        for name, weight in exact.items():
            model.get_submodule(name).weight.data = weight


def measure_sensitivity(model: nn.Module, examples: Sequence[Example], double_quant: bool) -> pd.DataFrame:
    """One row per module and scheme: `module`, `layer` (<NA> for embeddings and head), `kind`, `scheme`, `kl_nats`,
    `bytes`.

    The scheme "unquantized" is included, with a KL of 0 and the bytes of bf16, so the table holds every choice of a
    budget. A scheme that the shape of a module does not allow is left out. With n examples the relative standard error
    of an estimate is about √(2 / n); estimates above 0.1 nats are inaccurate.
    """
    table = list_choices(model, double_quant)
    choices = list(zip(table.module, table.scheme, strict=True))
    estimated = [(m, s) for m, s in choices if s != "unquantized" and layer_of(m) is not None]
    generator = torch.Generator(model.device).manual_seed(0)
    squares, positions = dict.fromkeys(estimated, 0.0), 0
    batches = batching.bucket_by_length([len(example.input_ids) for example in examples], BATCH_TOKENS)
    for rows in tqdm(batches, desc="sensitivity", unit="batch", delay=2, mininterval=10):
        batch = batching.collate([examples[i] for i in rows], pad_token_id=0)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        for choice, slopes in _slopes(model, batch, estimated, double_quant, generator).items():
            squares[choice] += slopes.square().sum().item()
        positions += len(batch["labels"])
    kl_nats = {choice: square / (2 * positions) for choice, square in squares.items()}
    exact = batching.collect_logits(model, examples)
    for module, scheme in choices:
        if scheme == "unquantized":
            kl_nats[module, scheme] = 0.0
        elif (module, scheme) not in kl_nats:
            with fake_quantized(model, {module: scheme}, double_quant):
                drift = batching.measure_drift(exact, batching.collect_logits(model, examples))
            kl_nats[module, scheme] = drift["kl_nats"]
    table.insert(4, "kl_nats", [kl_nats[choice] for choice in choices])
    return table.astype({"layer": "Int64"})


def list_choices(model: nn.Module, double_quant: bool) -> pd.DataFrame:
    """`measure_sensitivity`'s table without `kl_nats`, from shapes alone."""
    rows = []
    for name, shape in quantize.weight_shapes(model).items():
        weight, plain = memory_ledger.Weight(name, "mlp", shape), quantize.is_plain(model.get_submodule(name))
        for scheme in SCHEMES:
            if scheme == "unquantized" or (plain and (scheme != "nf4" or quantize.can_be_nf4(shape))):
                size = memory_ledger.plan_bytes([weight], {name: scheme}, double_quant=double_quant).bytes.sum()
                rows.append((name, layer_of(name), name.rsplit(".", 1)[-1], scheme, int(size)))
    return pd.DataFrame(rows, columns=["module", "layer", "kind", "scheme", "bytes"])


@torch.no_grad()
def measure_plans(
    model: nn.Module, examples: Sequence[Example], double_quant: bool, plans: Sequence[Plan], sensitivity: pd.DataFrame
) -> pd.DataFrame:
    """One row per plan: `plan`, `kl_nats` of the whole plan, `top1_changed`, `summed_kl_nats`, `bytes`.

    `summed_kl_nats` is the sum of the plan's rows in `sensitivity`, a table of `measure_sensitivity`: KLs of single
    modules add up only approximately.
    """
    single = sensitivity.set_index(["module", "scheme"])
    exact, rows = batching.collect_logits(model, examples), []
    for plan in tqdm(plans, desc="plans", unit="plan", delay=2, mininterval=10):
        with fake_quantized(model, plan.schemes, double_quant):
            drift = batching.measure_drift(exact, batching.collect_logits(model, examples))
        chosen = single.loc[list(plan.schemes.items())]
        rows.append((plan.name, drift["kl_nats"], drift["top1_changed"], chosen.kl_nats.sum(), int(chosen.bytes.sum())))
    return pd.DataFrame(rows, columns=["plan", "kl_nats", "top1_changed", "summed_kl_nats", "bytes"])


def _slopes(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    choices: Sequence[tuple[str, Scheme]],
    double_quant: bool,
    generator: torch.Generator,
) -> dict[tuple[str, Scheme], torch.Tensor]:
    """(module, scheme) → (examples,): slope of the log-probability of drawn tokens along the scheme's weight change.

    For linear layers of the decoder. A token is drawn independently at each predicted position, so the slopes of two
    positions are uncorrelated, and the expected square of their sum is the sum of their expected squares.
    """
    slopes: dict[tuple[str, Scheme], torch.Tensor] = {}
    embedded: list[torch.Tensor] = []  # gradients go back to the embedded input, and into no weight

    def start(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        embedded.append(output.requires_grad_())

    def watch(name: str, module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: add_slopes(name, module.weight.detach(), args[0].detach(), gradient))

    def add_slopes(name: str, weight: torch.Tensor, x: torch.Tensor, gradient: torch.Tensor) -> None:
        for scheme in [scheme for module, scheme in choices if module == name]:
            change = nn.functional.linear(x, rowwise.fake_quantize(weight, scheme, double_quant) - weight)
            slopes[name, scheme] = (gradient * change).sum(-1).float().sum(1)  # (B, L, rows) → (B,)

    with ExitStack() as hooks, torch.enable_grad():
        hooks.callback(model.get_input_embeddings().register_forward_hook(start).remove)
        for name in dict.fromkeys(name for name, _ in choices):
            hooks.callback(model.get_submodule(name).register_forward_hook(partial(watch, name)).remove)
        logprobs = batching.predict(model, batch).logits.log_softmax(-1)
        drawn = torch.multinomial(logprobs.detach().exp(), 1, generator=generator)
        torch.autograd.grad(logprobs.gather(1, drawn).sum(), embedded)
    return slopes
