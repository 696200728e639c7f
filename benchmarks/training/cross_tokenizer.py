"""A teacher with another tokenizer: what two tokenizations share, how large the losses are, and what a student gains.

Three parts on a finished run's own answers. Spans: all rows, tokenizers alone. Cache: the teacher at training rows,
and the untrained student's losses there; the teacher is first corrected (LoRA), on other rows than it is then
read at. Training: CE alone, CE + KL over spans, each from the same weights on the same batches,
judged by paired −log p per answer token of validation rows, and by −log p of the right option among a question's
options. Units: nats, bytes, fractions.

`--tokenizers STUDENT TEACHER` (two folders) measures the spans of two other tokenizers alone, in questions of each
source of the run and in their answers; no model reads them.
"""

import json
import os
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.inputs import make_parser, read_rows
from benchmarks.record import Ratio, versions, write
from medkit.distillation import cross_tokenizer
from medkit.distillation.teacher_cache import capture_teacher
from medkit.lora import adapters
from medkit.modeling import batches, loading, option_scoring, trainer
from medkit.params import load_params
from medkit.prompts import templates
from medkit.stage import ROOT
from medkit.statistics import mean_intervals


def main() -> None:
    parser = make_parser(__doc__)
    parser.set_defaults(params=ROOT / "params" / "cross.yaml")
    parser.add_argument("--signal-rows", type=int, default=240, help="rows of the teacher cache, or of each source")
    parser.add_argument("--correct-rows", type=int, default=128, help="other rows that correct the teacher; 0: none")
    parser.add_argument("--train-rows", type=int, default=96, help="of the first, rows to train on; 0: no training")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--valid-rows", type=int, default=105)
    parser.add_argument("--option-questions", type=int, default=40, help="of them, asked by option text too")
    parser.add_argument("--tokenizers", type=Path, nargs=2, metavar=("STUDENT", "TEACHER"), help="folders: spans alone")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    if args.tokenizers:
        return compare_tokenizers(args)
    sizes = {f"distillation.{name}.batch_size": args.batch_size for name in ("correction_train", "student_train")}
    params, before = load_params(args.params, sizes), os.getloadavg()
    folders = [loading.local_folder(section) for section in (params.models.student, params.models.teacher)]
    tokenizers = [loading.load_tokenizer(folder) for folder in folders]
    aligner = cross_tokenizer.TokenAligner.from_tokenizers(*tokenizers)
    shuffled, judged = read_rows(args, params, "private", "labelled"), read_rows(args, params, "valid")
    raw = {"spans": describe_spans(aligner, tokenizers, pd.concat([shuffled, judged]))}
    print(json.dumps(raw["spans"]), flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        others = shuffled.iloc[args.signal_rows :].head(args.correct_rows)
        teacher = correct(folders[1], tokenizers[1], params, others, Path(scratch))
        losses = measure_losses(
            teacher, folders[0], tokenizers, params, shuffled.head(args.signal_rows), aligner, Path(scratch)
        )
        del teacher
        raw["signals"] = losses.pop("record")
        print(json.dumps(raw["signals"]), flush=True)
        if args.train_rows:
            taught, valid = shuffled.head(args.train_rows), judged.head(args.valid_rows)
            raw["training"] = compare_training(folders[0], tokenizers[0], params, taught, valid, losses, args, scratch)
    raw |= {"loadavg_before": before, "loadavg_after": os.getloadavg()}
    ratios = {
        "one_to_one/spans": Ratio(raw["spans"]["one_to_one_spans"], None, "higher", raw["spans"]["answers"]),
        "one_to_one/bytes": Ratio(raw["spans"]["one_to_one_bytes"], None, "higher", raw["spans"]["answers"]),
        "shared/teacher_mass": Ratio(raw["signals"]["shared_mass"], None, "higher", raw["signals"]["spans"]),
    }
    for name, found in raw.get("training", {}).get("minus_ce", {}).items():
        for measure, gap in found.items():
            ratios[f"{measure}_minus_ce/{name}"] = Ratio(gap["mean"], None, "lower", gap["n"])
    setup = {
        "versions": versions("torch", "transformers", "tokenizers"), "run": args.run.name,
        "profile": args.params.name, "threads": args.threads,
        "rows": {"correct": args.correct_rows, "signals": args.signal_rows, "train": args.train_rows},
        "batch_size": args.batch_size, "learning_rate": params.distillation.student_train.learning_rate,
        "weights": {"ce": params.distillation.ce_weight, "kl": params.distillation.kl_weight},
        "teacher": params.models.teacher.source.file, "student": params.models.student.source.member,
    }  # fmt: skip
    write("cross_tokenizer", setup, ratios, raw, args.output)


def answers_of(examples: list[batches.Example]) -> list[list[int]]:
    return [example.input_ids[example.loss_start :] for example in examples]


def compare_tokenizers(args: Namespace) -> None:
    """Spans of two tokenizers in the questions and answers of a run, by source; no weights are needed."""
    tokenizers = [loading.load_tokenizer(folder) for folder in args.tokenizers]
    aligner = cross_tokenizer.TokenAligner.from_tokenizers(*tokenizers)
    rows = pd.read_parquet(args.run / "01_data" / "questions.parquet").query("answer >= 0")
    rows = rows.sample(frac=1, random_state=0).groupby("source", observed=True).head(args.signal_rows)
    texts = rows.assign(options=rows.question.map(lambda text: [text]), answer=0)
    raw = {
        f"{what}/{source}": describe_spans(aligner, tokenizers, part)
        for what, table in {"answers": rows, "questions": texts}.items()
        for source, part in [("all", table), *table.groupby("source", observed=True)]
    }
    ratios = {
        f"{what}/{name}": Ratio(raw[f"{what}/all"][name], None, "higher", raw[f"{what}/all"]["answers"])
        for what in ("answers", "questions")
        for name in ("one_to_one_spans", "one_to_one_bytes", "shared_of_text")
    }
    names = [folder.name for folder in args.tokenizers]
    setup = {"versions": versions("tokenizers"), "run": args.run.name, "student": names[0], "teacher": names[1]}
    write("two_tokenizers", setup, ratios, raw, args.output)


def describe_spans(aligner: cross_tokenizer.TokenAligner, tokenizers: list, rows: pd.DataFrame) -> dict:
    """How the two cut the answers. The end of an answer is a span of one token on both sides and of no bytes."""
    sides = [batches.encode_questions(one, rows) for one in tokenizers]
    found = cross_tokenizer.measure_spans(aligner, *sides)
    shapes, sizes = pd.Series([span[:2] for span in found]), np.array([span[2] for span in found])
    single = shapes.isin([(1, 1)]).to_numpy()
    taught = np.concatenate([own for answer in answers_of(sides[1]) if len(own := aligner.shared[answer[:-1]])])
    return {
        "shared_of_text": float((taught >= 0).mean()),  # of the teacher's tokens that stand here
        "answers": len(rows), "spans": len(shapes), "answer_bytes": int(sizes.sum()),
        "student_tokens": sum(e.num_predicted for e in sides[0]),
        "teacher_tokens": sum(e.num_predicted for e in sides[1]),
        "one_to_one_spans": float(single.mean()), "one_to_one_bytes": float(sizes[single].sum() / sizes.sum()),
        "shapes": {f"{m}:{n}": int(count) for (m, n), count in shapes.value_counts().head(8).items()},
        "shared_vocabulary": {
            "tokens": int((aligner.shared >= 0).sum()),
            "of_student": float((aligner.shared >= 0).sum() / len(aligner.student.ids)),
            "of_teacher": float((aligner.shared >= 0).sum() / len(aligner.teacher.ids)),
        },
    }  # fmt: skip


def correct(folder: Path, tokenizer, params, rows: pd.DataFrame, scratch: Path):
    """The teacher, with an adapter that learned these rows merged into it; without rows as it was published."""
    teacher = loading.load_model(folder, params.models)
    if not len(rows):
        return teacher
    examples, section = batches.encode_questions(tokenizer, rows), params.distillation
    adapted = adapters.attach(teacher, section.correction, params.seed)
    given = (section.correction_train, trainer.cross_entropy, scratch / "teacher", params.seed)
    log = trainer.train(adapted, examples, *given)
    print("correction", len(log), "steps, ce", log.ce.iloc[0], "to", log.ce.iloc[-1], os.getloadavg(), flush=True)
    return adapters.merge(adapted)


def measure_losses(
    teacher, folder, tokenizers, params, rows: pd.DataFrame, aligner: cross_tokenizer.TokenAligner, scratch: Path
) -> dict:
    """The teacher's cache and option scores at these rows, and the untrained student's losses against them."""
    examples = [batches.encode_questions(one, rows) for one in tokenizers]
    began = time.perf_counter()
    cache = capture_teacher(lambda: teacher, examples[1], scratch / "cache", params.distillation.top_k, 64, "cross")
    scores = score(teacher, tokenizers[1], rows, params)
    seconds = time.perf_counter() - began
    aligned = cross_tokenizer.AlignedCache(cache, *examples, aligner)
    student = loading.load_model(folder, params.models)
    spans = []
    for numbers, predicted in batches.iterate_predicted(student, examples[0]):
        cached = aligned.batch(numbers)
        kl = cross_tokenizer.span_kl(predicted.logits, predicted.targets, **cached)
        nll = torch.nn.functional.cross_entropy(predicted.logits, predicted.targets, reduction="none")
        own = [part.sum().item() for part in nll.split(cached["span_lengths"].tolist())]
        shapes = [(len(s.student), len(s.teacher)) for n in numbers for s in aligner.align(*aligned.answers[n])]
        weight = cached["span_logprobs"].exp().sum(-1)
        kept = [cache.example(n)["teacher_logprobs"].exp().sum(-1) for n in numbers]
        places = [[span.teacher[-1] for span in aligner.align(*aligned.answers[n])] for n in numbers]
        ends = torch.cat([mass[last] for mass, last in zip(kept, places, strict=True)])
        found = {"kl": kl, "ce": torch.tensor(own), "shared": weight, "kept": ends}
        spans.append(pd.DataFrame({name: values.numpy() for name, values in found.items()}).assign(shape=shapes))
    spans = pd.concat(spans, ignore_index=True)
    single = spans["shape"].isin([(1, 1)])
    num_tokens = sum(map(len, answers_of(examples[0])))
    num_bytes = sum(
        len(b"".join(aligner.student.to_bytes(own))) - len(cross_tokenizer.END) for own in answers_of(examples[0])
    )
    teacher_nll = -sum(cache.example(n)["teacher_target_logprobs"].sum().item() for n in range(len(rows)))
    record = {
        "rows": len(rows), "spans": len(spans), "top_k": params.distillation.top_k, "teacher_seconds": seconds,
        "kept_mass": float(spans.kept[single].mean()),
        "shared_mass": float(spans.shared[single].mean()),
        "shared_of_kept": float((spans.shared[single] / spans.kept[single]).mean()),
        "kl_per_span": {"one_to_one": float(spans.kl[single].mean()), "others": float(spans.kl[~single].mean())},
        "ce_per_span": {"one_to_one": float(spans.ce[single].mean()), "others": float(spans.ce[~single].mean())},
        "kl_per_token": float(spans.kl.sum() / num_tokens),
        "ce_per_token": float(spans.ce.sum() / num_tokens),
        "nll_per_byte": {"student": float(spans.ce.sum()) / num_bytes, "teacher": teacher_nll / num_bytes},
        "teacher_option_nll": float(np.mean(right_nll(scores, rows))),
        "teacher_accuracy": accuracy(scores, rows),
    }  # fmt: skip
    return {"record": record, "extras": aligned.batch, "examples": examples[0], "scores": scores}


def score(model, tokenizer, rows: pd.DataFrame, params) -> list[list[float]]:
    """Summed log-probability of every option's text."""
    items = []
    for question in rows.to_dict("records"):
        messages = templates.render(question, templates.pick_template(question["kind"], "option_text"))
        encoded = [templates.encode(tokenizer, messages, option) for option in question["options"]]
        items.append(option_scoring.Item(encoded[0][0], [answer_ids for _, answer_ids in encoded]))
    return option_scoring.score_options(model, items)


def right_nll(scores: list[list[float]], rows: pd.DataFrame) -> list[float]:
    """−log p of the right option, the options' probabilities adding up to 1."""
    return [
        float(np.logaddexp.reduce(own) - own[right]) for own, right in zip(scores, rows.answer.tolist(), strict=True)
    ]


def accuracy(scores: list[list[float]], rows: pd.DataFrame) -> float:
    return float(np.mean([np.argmax(own) == right for own, right in zip(scores, rows.answer, strict=True)]))


def compare_training(folder: Path, tokenizer, params, rows, valid, losses, args, scratch) -> dict:
    """−log p of validation answers after each arm, and each arm minus CE alone, question by question."""
    weights = params.distillation.ce_weight, params.distillation.kl_weight
    examples = losses["examples"][: len(rows)]
    arms = {
        "untrained": None,
        "ce": (trainer.cross_entropy, lambda numbers: {}),
        "ce_span_kl": (cross_tokenizer.SpanLoss(*weights), losses["extras"]),
    }
    judged = batches.encode_questions(tokenizer, valid)
    some = valid.head(args.option_questions)
    found, record = {}, {"arms": {}, "valid_rows": len(valid), "option_questions": len(some)}
    for name, arm in arms.items():
        model, began, logged = loading.load_model(folder, params.models), time.perf_counter(), {}
        if arm:
            loss, extras = arm
            section = params.distillation.student_train
            log = trainer.train(model, examples, section, loss, Path(scratch) / name, params.seed, extras)
            terms = [term for term in ("ce", "span_kl") if term in log]
            logged = {"steps": len(log), "first": log.iloc[0][terms].to_dict(), "last": log.iloc[-1][terms].to_dict()}
        seconds = time.perf_counter() - began
        scores = score(model, tokenizer, some, params)
        found[name] = {"nll": batches.predict_examples(model, judged).nll, "option_nll": right_nll(scores, some)}
        record["arms"][name] = logged | {
            "train_seconds": seconds, "nll": float(np.mean(found[name]["nll"])),
            "option_nll": float(np.mean(found[name]["option_nll"])), "accuracy": accuracy(scores, some),
            "loadavg": os.getloadavg(),
        }  # fmt: skip
        print(name, json.dumps(record["arms"][name]), flush=True)
    record["minus_ce"] = {
        name: {
            measure: difference(found[name][measure], found["ce"][measure], table.group, params.evaluation.confidence)
            for measure, table in (("nll", valid), ("option_nll", some))
        }
        for name in arms
        if name != "ce"
    }
    return record


def difference(ours, theirs, groups, confidence: float) -> dict:
    """ours − theirs, paired: mean and its bootstrap interval over groups of near-duplicates."""
    gap = np.subtract(ours, theirs)
    (low,), (high,) = mean_intervals(gap[:, None], groups, confidence)
    return {"mean": float(gap.mean()), "ci_low": float(low), "ci_high": float(high), "n": len(gap)}


if __name__ == "__main__":
    main()
