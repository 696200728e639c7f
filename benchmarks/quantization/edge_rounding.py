"""What each way of rounding to llama.cpp's blocks costs a student, at equal bytes: KL, changed answers, scores, time.

Ways: to the nearest, with scales searched for important inputs, GPTQ, GPTQ with fitted scales (what notebook 04 does),
and scales that learn on top of it. Formats: Q4_0 in the layers, Q4_0, Q5_0 or Q8_0 for embeddings and head, and Q5_0
throughout. Fitted to every option of labelled rows, as in notebook 04; judged on the validation rows of each task: KL
at the tokens of every option or record, the share of questions whose option changes, and the score (right options,
field F1 of records). No test question is read. Weights are those of the file, decoded. Units: nats, processor seconds.
"""

import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from unittest.mock import patch

import gguf
import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.func import functional_call
from tqdm.auto import tqdm

from benchmarks.inputs import load_student, make_parser
from benchmarks.record import versions, write
from medkit.data import splits
from medkit.evaluation.records import score_questions
from medkit.inference import predictions
from medkit.modeling import batches
from medkit.modeling.batches import Example
from medkit.params import Params
from medkit.quantization import gguf_blocks, gptq, plans, quantize
from medkit.quantization.gguf_blocks import BITS, Blocks

FORMATS = [("Q4_0", "Q4_0"), ("Q4_0", "Q5_0"), ("Q4_0", "Q8_0"), ("Q5_0", "Q5_0")]
WAYS = ["nearest", "searched", "gptq", "fitted", "learned"]


def encode_options(tokenizer, rows: pd.DataFrame) -> list[Example]:
    """One example per option of each question, right or wrong."""
    rows = rows.assign(answer=rows.options.map(lambda options: range(len(options)))).explode("answer")
    return batches.encode_questions(tokenizer, rows)


class Judge:
    """The exact student's logits and answers on the validation rows, against which the rounded one is measured."""

    def __init__(self, model: nn.Module, tokenizer, rows: pd.DataFrame, params: Params):
        self.model, self.tokenizer, self.sizes = model, tokenizer, params.inference
        self.rows = rows.assign(scoring=np.where(rows.kind == "record", "generated", "option_text"))
        self.examples = {source: encode_options(tokenizer, part) for source, part in rows.groupby("source", sort=False)}
        self.logits, self.answers = self._read()

    def _read(self) -> tuple[dict[str, torch.Tensor], pd.DataFrame]:
        logits = {source: batches.collect_logits(self.model, part) for source, part in self.examples.items()}
        limits = self.sizes.batch_tokens, self.sizes.max_new_tokens
        return logits, predictions.predict(self.model, self.tokenizer, self.rows, *limits).assign(variant="rounded")

    def measure(self) -> dict[str, float]:
        logits, answers = self._read()
        choices = [
            [int(np.argmax(row.logprobs)) for row in table.itertuples() if row.scoring == "option_text"]
            for table in (answers, self.answers)
        ]
        row = {"options_changed": float(np.mean(np.not_equal(*choices)))}
        for source, part in score_questions(answers, self.rows).groupby("source"):
            drift = batches.measure_drift(self.logits[source], logits[source])
            row |= {f"{name}/{source}": drift[name] for name in ("kl_nats", "top1_changed")}
            row[f"score/{source}"] = float(part.score.mean())
        return row


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
            importance = None if hessian is None else torch.diag(hessian.diagonal())
            blocks = gguf_blocks.round_to_blocks(weight, kinds[name], importance)
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
    parser.add_argument("--steps", type=int, default=60, help="of learned scales")
    parser.add_argument("--learned", nargs="*", default=["Q4_0"], help="embeddings with which scales also learn")
    args = parser.parse_args()
    tokenizer, model, params = load_student(args)
    questions = pd.read_parquet(args.run / "01_data" / "questions.parquet")
    labelled = splits.training_rows(questions, "labelled").sample(frac=1, random_state=params.seed)
    fitted = encode_options(tokenizer, labelled.head(params.quantization.calibration_examples))
    valid = splits.training_rows(questions, "valid")
    judge = Judge(model, tokenizer, valid, params)
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
            judged = judge.measure()
            for name, weight in exact.items():
                model.get_submodule(name).weight.data = weight
            bits = sum(
                weight.numel() * (0.5 + BITS[embeddings if plans.layer_of(name) is None else layers])
                for name, weight in exact.items()
            )
            row = {"layers": layers, "embeddings": embeddings, "way": way, "share": bits / 16 / count, "cpu_s": seconds}
            rows.append(row | judged)
            print(rows[-1], flush=True)
    setup = {
        "student_layers": len(model.get_decoder().layers), "weights": count, "fitted_to": len(fitted),
        "steps": args.steps, "judged_on": valid.source.value_counts().to_dict(), "threads": args.threads,
        "versions": versions("torch", "transformers", "gguf"),
    }  # fmt: skip
    files = {"files": pd.DataFrame(rows).round(5).to_dict("records")}
    write("edge_rounding", setup, {}, files, args.output, files)


if __name__ == "__main__":
    main()
