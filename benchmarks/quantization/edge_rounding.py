"""What each way of rounding to llama.cpp's blocks costs a student, at equal bytes: KL, changed top tokens, seconds.

Ways: to the nearest, with scales searched for important inputs, GPTQ, GPTQ with fitted scales (what notebook 04 does),
and scales that learn on top of it. Formats: Q4_0 in the layers, Q4_0, Q5_0 or Q8_0 for embeddings and head, and Q5_0
throughout. Fitted to every option of labelled rows, judged on every option of validation rows; no test question is
read. Weights are those of the file, decoded. Units: nats, seconds of processor time.
"""

import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from unittest.mock import patch

import gguf
import pandas as pd
import torch
from torch import nn
from torch.func import functional_call
from tqdm.auto import tqdm

from benchmarks.inputs import load_student, make_parser, read_rows
from benchmarks.record import Ratio, versions, write
from medkit.modeling import batches
from medkit.modeling.batches import Example
from medkit.quantization import gguf_blocks, gptq, plans, quantize
from medkit.quantization.gguf_blocks import BITS, Blocks

FORMATS = [("Q4_0", "Q4_0"), ("Q4_0", "Q5_0"), ("Q4_0", "Q8_0"), ("Q5_0", "Q5_0")]
WAYS = ["nearest", "searched", "gptq", "fitted", "learned"]


def encode_options(tokenizer, rows: pd.DataFrame) -> list[Example]:
    """One example per option of each question, right or wrong."""
    rows = rows.assign(answer=rows.options.map(lambda options: range(len(options)))).explode("answer")
    return batches.encode_questions(tokenizer, rows)


def round_model(model, examples, layers: str, embeddings: str, way: str, steps: int) -> dict[str, torch.Tensor]:
    """Module → decoded weight."""
    shapes = quantize.weight_shapes(model)
    kinds = {name: embeddings if plans.layer_of(name) is None else layers for name in shapes}
    if way == "nearest":
        weights = {}
        for name, kind in kinds.items():
            values, kind = model.get_submodule(name).weight.detach().numpy(), gguf.GGMLQuantizationType[kind]
            weights[name] = torch.from_numpy(gguf.dequantize(gguf.quantize(values, kind), kind).copy())
        return weights
    if way == "searched":

        def round_weight(name, weight, hessian):
            blocks = gguf_blocks.round_to_blocks(weight, kinds[name], torch.diag(hessian.diagonal()))
            return blocks, blocks.decode()

        blocks = gptq.calibrate(model, kinds, examples, round_weight)
    elif way == "gptq":
        with patch.object(gguf_blocks, "fit_scales", lambda weight, codes, scales, hessian: scales):
            blocks = gguf_blocks.quantize_blocks(model, examples, layers, embeddings)
    else:
        blocks = gguf_blocks.quantize_blocks(model, examples, layers, embeddings)
        blocks = learn_scales(model, blocks, examples, steps if way == "learned" else 0)
    return {name: stored.decode() for name, stored in blocks.items()}


def learn_scales(
    model: nn.Module,
    blocks: dict[str, Blocks],
    examples: Sequence[Example],
    steps: int,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> dict[str, Blocks]:
    """The same codes with scales trained against KL(model ‖ blocks) at all positions of `examples`, in nats.

    A scale is d·exp(s), rounded to float16; the gradient passes the rounding. Adam, learning rate falling to zero.
    After DWQ of mlx-lm. The model itself is the teacher and does not change.
    """
    logs = {name: torch.zeros(b.scales.shape, device=model.device, requires_grad=True) for name, b in blocks.items()}
    optimizer = torch.optim.Adam(logs.values(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    packed = [batches.model_inputs(model, batch) for _, batch in batches.iterate_packed(model, examples)]
    repeated = itertools.islice(_repeat(packed, seed), steps)
    for inputs in tqdm(repeated, total=steps, desc="scales", unit="step", delay=2, mininterval=10):
        with torch.no_grad():
            target = model(**inputs).logits[0].float().log_softmax(-1)
        weights = {
            f"{n}.weight": replace(b, scales=_scales(b, logs[n])).decode().to(model.dtype) for n, b in blocks.items()
        }
        logprobs = functional_call(model, weights, (), inputs).logits[0].float().log_softmax(-1)
        loss = nn.functional.kl_div(logprobs, target, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: replace(b, scales=_scales(b, logs[name]).detach().half()) for name, b in blocks.items()}


def _scales(blocks: Blocks, logs: torch.Tensor) -> torch.Tensor:
    """Scales in float32 with values of float16, and the gradient of the unrounded ones."""
    exact = blocks.scales.float() * logs.exp()
    return exact + (exact.half().float() - exact).detach()


def _repeat(packed: list[dict], seed: int) -> Iterator[dict]:
    """The batches again and again, each time in another order."""
    draw = random.Random(seed)
    while True:
        yield from draw.sample(packed, len(packed))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=48, help="labelled rows to fit to, and validation rows to judge on")
    parser.add_argument("--steps", type=int, default=60, help="of learned scales")
    parser.add_argument("--learned", nargs="*", default=["Q4_0"], help="embeddings with which scales also learn")
    args = parser.parse_args()
    tokenizer, model, params = load_student(args)
    fitted, judged = (
        encode_options(tokenizer, read_rows(args, params, split, number=args.rows)) for split in ("labelled", "valid")
    )
    before = batches.collect_logits(model, judged)
    exact = {name: model.get_submodule(name).weight.data for name in quantize.weight_shapes(model)}
    count = sum(weight.numel() for weight in exact.values())
    rows = []
    for layers, embeddings in FORMATS:
        for way in WAYS if embeddings in args.learned and layers == "Q4_0" else WAYS[:-1]:
            began = time.process_time()
            weights = round_model(model, fitted, layers, embeddings, way, args.steps)
            seconds = time.process_time() - began
            for name, weight in weights.items():
                model.get_submodule(name).weight.data = weight
            drift = batches.measure_drift(before, batches.collect_logits(model, judged))
            for name, weight in exact.items():
                model.get_submodule(name).weight.data = weight
            bits = sum(
                weight.numel() * (0.5 + BITS[embeddings if plans.layer_of(name) is None else layers])
                for name, weight in exact.items()
            )
            row = {"layers": layers, "embeddings": embeddings, "way": way, "share": bits / 16 / count, "cpu_s": seconds}
            rows.append(row | {name: drift[name] for name in ("kl_nats", "top1_changed")})
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    kl = table.set_index(["layers", "embeddings", "way"]).kl_nats
    ratios = {
        f"{layers}, embeddings {embeddings}/{way}/kl_over_nearest": Ratio(
            kl[layers, embeddings, way] / kl[layers, embeddings, "nearest"], None, "lower", 1
        )
        for layers, embeddings, way in kl.index
        if way != "nearest"
    }
    setup = {
        "student_layers": len(model.get_decoder().layers), "weights": count, "rows": args.rows, "steps": args.steps,
        "positions": len(before), "threads": args.threads, "versions": versions("torch", "transformers", "gguf"),
    }  # fmt: skip
    files = {"files": table.round(5).to_dict("records")}
    write("edge_rounding", setup, ratios, files, args.output, files)


if __name__ == "__main__":
    main()
