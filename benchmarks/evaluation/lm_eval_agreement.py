"""Does our scoring say what lm-evaluation-harness says? The same model, items and prompts; float32, on the CPU.

The test questions are written to json files with the columns that lm-eval's own tasks read, and its own task files
render them (`include:` of the package's yaml, with the local file as dataset). What had to be adapted is in TASKS.
lm-eval scores through its `HFLM`, one sequence at a time; ours scores the same context and continuation tokens with
`score_options`. Both take turns on parts of each set. Units: nats, and seconds, by the clock and of this process's
processor time; the ratio is of the latter, since other programs stretch the former.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml

from benchmarks.record import RESULTS, Ratio, versions, write

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
try:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError:
    sys.exit("lm_eval_agreement: lm_eval is not installed; install the extra `dev` (pip install -e '.[dev]') first")

from medkit import sources
from medkit.data import splits
from medkit.modeling import loading, option_scoring
from medkit.params import load_params
from medkit.stage import ROOT

PACKAGE_TASKS = Path(lm_eval.__file__).parent / "tasks"
VERSIONS = ("torch", "transformers", "lm_eval", "datasets")
LOGLIKELIHOOD_GOAL = 1e-3  # nats; float32 sums in another order
LETTER_SPEED, TEXT_SPEED = 1.6, 3.0  # goals


@dataclass(frozen=True)
class Adapted:
    """One of lm-eval's tasks over local questions."""

    source: str
    base: str
    """Its yaml inside the package."""
    document: Callable[[dict], dict]
    """A question row as a document of that task."""
    changes: dict = field(default_factory=dict)
    """Keys of the yaml that differ, beside those that name the dataset."""
    why: str = ""


def _medqa(q: dict) -> dict:
    return {"sent1": q["question"], "label": q["answer"], **{f"ending{i}": text for i, text in enumerate(q["options"])}}


def _medmcqa(q: dict) -> dict:
    return {"question": q["question"], "cop": q["answer"], **dict(zip(("opa", "opb", "opc", "opd"), q["options"]))}  # noqa: B905


def _pubmedqa(q: dict) -> dict:
    return {"QUESTION": q["question"], "CONTEXTS": [q["context"]], "final_decision": q["options"][q["answer"]]}


def _mmlu(q: dict) -> dict:
    return {"question": q["question"], "choices": list(q["options"]), "answer": q["answer"]}


FIVE = "".join(f"{letter}. {{{{ending{i}}}}}\n" for i, letter in enumerate("ABCDE"))
TASKS = {
    "medqa": Adapted(
        "medqa", "medqa/medqa.yaml", _medqa,
        {"doc_to_text": f"Question: {{{{sent1}}}}\n{FIVE}Answer:", "doc_to_choice": list("ABCDE")},
        "five options, as our file has them; lm-eval's task has four",
    ),
    "medmcqa": Adapted("medmcqa", "medmcqa/medmcqa.yaml", _medmcqa),
    "medmcqa_text": Adapted(
        "medmcqa", "medmcqa/medmcqa.yaml", _medmcqa,
        {"doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": "{{[opa, opb, opc, opd]}}"},
        "the options' own texts as continuations: many tokens, and acc_norm that differs from acc",
    ),
    "pubmedqa": Adapted(
        "pubmedqa", "pubmedqa/pubmedqa.yaml", _pubmedqa,
        why="the abstract is one paragraph, since our file has lost its sections' borders",
    ),
    "mmlu": Adapted(
        "mmlu", "mmlu/default/mmlu_clinical_knowledge.yaml", _mmlu,
        why="six medical subjects under the description of one, since our file does not say which is which",
    ),
}  # fmt: skip


def read_questions() -> dict[str, pd.DataFrame]:
    """Per exam every usable question that has an answer and may be tested on, from the tiny profile's files."""
    params = load_params(ROOT / "params" / "tiny.yaml")
    datasets = {name: params.data.datasets[name] for name in sorted({task.source for task in TASKS.values()})}
    paths = {name: sources.fetch(dataset.origin) for name, dataset in datasets.items()}
    table, _ = splits.load_questions(datasets, paths, params.seed)
    table = table[(table.answer >= 0) & ~table.pool.isin(["train", "transfer"])]
    return {name: table[table.source == name].reset_index(drop=True) for name in datasets}


def write_tasks(questions: dict[str, pd.DataFrame], folder: Path) -> None:
    """For each task a json file of documents and a yaml that includes the package's own."""
    for name, task in TASKS.items():
        file = folder / f"{name}.jsonl"
        documents = [task.document(row) for row in questions[task.source].to_dict("records")]
        file.write_text("".join(json.dumps(document) + "\n" for document in documents))
        settings = {
            "include": str(PACKAGE_TASKS / task.base),
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")},
            "training_split": None,
            "validation_split": None,
            "test_split": "test",
            "fewshot_split": None,
            "fewshot_config": None,
            "num_fewshot": 0,
            "tag": None,
            **task.changes,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))


class Stopwatch:
    """Seconds of a `with` block: by the clock, and of this process's processor time."""

    def __enter__(self):
        self.began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error):
        self.clock_s, self.cpu_s = time.perf_counter() - self.began[0], time.process_time() - self.began[1]


class TimedHFLM(HFLM):
    """lm-eval's model, with the time of its last call, tokenising included."""

    def loglikelihood(self, requests, disable_tqdm=True):
        with Stopwatch() as self.watch:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)


def score_by_harness(
    lm: TimedHFLM, manager: TaskManager, name: str, numbers: list[int]
) -> tuple[list[dict], Stopwatch]:
    """lm-eval's samples of these documents, in order, and its time."""
    evaluated = lm_eval.simple_evaluate(
        model=lm,
        tasks=[f"local_{name}"],
        task_manager=manager,
        samples={f"local_{name}": numbers},
        bootstrap_iters=0,
        log_samples=True,
    )
    return sorted(evaluated["samples"][f"local_{name}"], key=lambda sample: sample["doc_id"]), lm.watch


def score_by_ours(
    lm: TimedHFLM, requests: list[list[tuple[str, str]]]
) -> tuple[list[list[float]], Stopwatch, list[option_scoring.Item]]:
    """Our scores of the same (context, continuation) pairs per document, our time, and what was scored.

    Texts are cut into tokens as lm-eval does it: the whole is tokenised, and what follows the context's tokens is the
    continuation. Its own method does it here, so that both read the same tokens.
    """
    with Stopwatch() as watch:
        items = []
        for pairs in requests:
            encoded = [lm._encode_pair(context, continuation) for context, continuation in pairs]
            if any(prompt != encoded[0][0] for prompt, _ in encoded):
                raise RuntimeError("one document with two contexts: its options cannot share one reading")
            items.append(option_scoring.Item(encoded[0][0], [answer for _, answer in encoded]))
        scores = option_scoring.score_options(lm.model, items)
    return scores, watch, items


def compare(
    model, tokenizer, questions: dict[str, pd.DataFrame], rounds: int, tasks: Collection[str]
) -> dict[str, dict]:
    """Per task of `tasks`: predictions, log-likelihoods, accuracies and seconds of both, who take turns `rounds` times.

    acc_norm is lm-eval's: log-likelihood divided by the number of characters.
    """
    lm = TimedHFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        write_tasks(questions, Path(scratch))
        manager = TaskManager(include_path=scratch, include_defaults=False)
        for name in tasks:
            task = TASKS[name]
            parts = np.array_split(np.arange(len(questions[task.source])), rounds)
            samples, ours, items, rounds_s = [], [], [], []
            for part in parts:
                their_samples, theirs = score_by_harness(lm, manager, name, part.tolist())
                scores, mine, scored = score_by_ours(lm, [pairs_of(sample) for sample in their_samples])
                samples += their_samples
                ours += scores
                items += scored
                rounds_s.append(
                    {
                        contender: {"clock": watch.clock_s, "cpu": watch.cpu_s}
                        for contender, watch in (("lm_eval", theirs), ("medkit", mine))
                    }
                )
            results[name] = summarise(samples, ours, list(questions[task.source].answer)) | {"rounds_s": rounds_s}
            print(name, json.dumps(results[name]), flush=True)
    return results


def pairs_of(sample: dict) -> list[tuple[str, str]]:
    """The (context, continuation) pairs that lm-eval asked for in a document."""
    asked = sample["arguments"]
    asked = asked.values() if isinstance(asked, dict) else asked
    return [tuple(pair.values()) if isinstance(pair, dict) else tuple(pair) for pair in asked]


def summarise(samples: list[dict], ours: list[list[float]], answers: list[int]) -> dict:
    """How lm-eval's samples and our scores compare; `answers` are the right options' numbers."""
    equal, differences, gaps, accuracy = 0, [], [], {"lm_eval": {}, "medkit": {}}
    right = {"acc": [], "acc_norm": []}
    for sample, scores, answer in zip(samples, ours, answers, strict=True):
        theirs = np.array([response[0] for response in sample["filtered_resps"]], dtype=float)
        scores = np.array(scores)
        differences.append(float(np.abs(theirs - scores).max()))
        if theirs.argmax() == scores.argmax():
            equal += 1
        else:
            gaps.append(float(theirs.max() - theirs[scores.argmax()]))
        lengths = np.array([len(continuation.removeprefix(" ")) for _, continuation in pairs_of(sample)])
        right["acc"].append(scores.argmax() == answer)
        right["acc_norm"].append((scores / lengths).argmax() == answer)
    for metric, hits in right.items():
        if metric in samples[0]:
            accuracy["lm_eval"][metric] = float(np.mean([sample[metric] for sample in samples]))
            accuracy["medkit"][metric] = float(np.mean(hits))
    return {
        "items": len(samples),
        "predictions_equal": equal / len(samples),
        "gaps_where_different_nats": gaps,
        "max_abs_loglikelihood_difference": max(differences),
        "accuracy": accuracy,
    }


def ratios(results: dict[str, dict]) -> dict[str, Ratio]:
    """Shares, differences and times; `repeats` is the number of items, for times that of the rounds."""
    rows = {}
    for name, result in results.items():
        n = result["items"]
        rows[f"{name}/predictions_equal"] = Ratio(result["predictions_equal"], 1.0, "higher", n)
        rows[f"{name}/max_abs_loglikelihood_difference"] = Ratio(
            result["max_abs_loglikelihood_difference"], LOGLIKELIHOOD_GOAL, "lower", n
        )
        for metric, theirs in result["accuracy"]["lm_eval"].items():
            difference = abs(theirs - result["accuracy"]["medkit"][metric])
            rows[f"{name}/{metric}_difference"] = Ratio(difference, 5e-5, "lower", n)
        times = [turn["lm_eval"]["cpu"] / turn["medkit"]["cpu"] for turn in result["rounds_s"]]
        goal = TEXT_SPEED if name.endswith("_text") else LETTER_SPEED
        rows[f"{name}/lm_eval_cpu_seconds_over_ours"] = Ratio(statistics.median(times), goal, "higher", len(times))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a model on this machine; default the tiny profile's")
    parser.add_argument("--limit", type=int, help="questions per set, drawn at random; default all")
    parser.add_argument("--task", choices=TASKS, action="append", help="default all")
    parser.add_argument("--rounds", type=int, default=3, help="parts of each set, on which both take turns")
    parser.add_argument("--threads", type=int, default=1, help="more only on an idle machine")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    params = load_params(ROOT / "params" / "tiny.yaml")
    folder = args.folder or loading.local_folder(params.models.teacher)
    settings = params.models.model_copy(update={"device": "cpu", "dtype": "float32"})
    model, tokenizer = loading.load_model(folder, settings), loading.load_tokenizer(folder)
    questions = read_questions()
    if args.limit:
        questions = {
            name: table.sample(min(args.limit, len(table)), random_state=0).reset_index(drop=True)
            for name, table in questions.items()
        }
    before = os.getloadavg()
    tasks = args.task or list(TASKS)
    results = compare(model, tokenizer, questions, args.rounds, tasks)
    now = {"date": datetime.now(UTC).date().isoformat(), "limit": args.limit, "loadavg_before": before}
    now |= {"loadavg_after": os.getloadavg(), "threads": args.threads}
    results = {name: result | now for name, result in results.items()}
    setup = {
        "model": folder.name, "dtype": "float32",
        "items": {name: result["items"] for name, result in results.items()},
        "tasks": {name: {"include": task.base, "changes": task.changes, "why": task.why}
                  for name, task in TASKS.items()},
        "lm_eval": "HFLM, batch size 1, its own tokenising of context and continuation, logits cache on (default)",
        "medkit": "score_options, trees of at most 512 tokens, the same tokens",
        "timed": {"rounds": args.rounds, "statistic": "median of the rounds' ratios; contenders take turns"},
        "versions": versions(*VERSIONS),
    }  # fmt: skip
    write("lm_eval_agreement", setup, ratios(results), {"tasks": results}, args.output)


if __name__ == "__main__":
    main()
