"""Checks of the exercises in `notebooks/exercises`: an answer is right, or there is a hint, never the answer.

The truth is computed from the run's own files, from what a notebook hands to the check, and from small formulas.
`checks.yaml` has the points, the tolerance, the form of an answer and the hint of each exercise.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import numpy as np
import pandas as pd
import torch
import yaml

from medkit import distillation, statistics
from medkit.data.near_duplicates import normalise, word_runs
from medkit.evaluation import judge
from medkit.evaluation.accuracy import questions_needed
from medkit.modeling.batches import bucket_by_length
from medkit.stage import MedkitError, Stage

EXERCISES: dict[str, dict] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


class NoAnswerError(MedkitError):
    """An exercise in which `...` still stands."""


class Checks:
    """The checks on one run: `check("4.2", answer)` prints a sentence, `check.summary()` the points."""

    def __init__(self, run: str):
        self.run, self.right = run, {}

    def __call__(self, number: str, answer, **given) -> None:
        """given: what the truth is computed from, beside the run's files. Raises StageError if a stage is missing."""
        exercise, self.right[number] = EXERCISES[number], False
        try:
            answer = _called(answer)
            if number in BARS:
                right = BARS[number](answer, **given)
            else:
                right = _close(answer, TRUTHS[number](self, **given), **exercise["tolerance"])
            sentence = f"right, {exercise['points']} points." if right else f"not yet. Hint: {exercise['hint']}"
            self.right[number] = bool(right)
        except NoAnswerError:
            sentence = "no answer yet. Write it in place of the `...` above, then run that cell and this one again."
        except MedkitError:
            raise
        except Exception as error:  # a student's function or value may fail in any way
            sentence = f"the answer fails ({type(error).__name__}: {error}). It must be {exercise['form']}."
        print(f"{number}: {sentence}")

    def summary(self) -> None:
        points = {number: EXERCISES[number]["points"] for number in self.right}
        right = [number for number, is_right in self.right.items() if is_right]
        reached = sum(points[number] for number in right)
        print(f"{len(right)} of {len(points)} exercises are right: {reached} of {sum(points.values())} points.")

    def path(self, place: str) -> Path:
        return Stage(self.run, "exercises").require(*place.split("/", 1))

    def table(self, place: str, **where) -> pd.DataFrame:
        """A table of the run, or its rows in which the columns have these values."""
        table = pd.read_parquet(self.path(f"{place}.parquet"))
        return table[np.logical_and.reduce([table[name] == value for name, value in where.items()])] if where else table


def _called(answer):
    """The answer, or a function that raises NoAnswerError where the answer is a function that returns nothing."""
    values = list(answer.values()) if isinstance(answer, dict) else answer
    if any(value is ... or value is None for value in (values if isinstance(values, list | tuple) else [values])):
        raise NoAnswerError("no answer")
    return (lambda *args: _called(answer(*args))) if callable(answer) else answer


def _close(answer, truth, atol: float = 0.0, rtol: float = 0.0) -> bool:
    if isinstance(truth, set):
        return set(answer) == truth
    values = (value.detach().cpu() if isinstance(value, torch.Tensor) else value for value in (answer, truth))
    answer, truth = (np.asarray(value, float) for value in values)
    if answer.shape != truth.shape:
        raise ValueError(f"its shape is {answer.shape}, not {truth.shape}")
    return np.allclose(answer, truth, rtol, atol, equal_nan=True)


# --- what is true ----------------------------------------------------------------------------------------------------


def _shares(left: Sequence[str], right: Sequence[str]) -> np.ndarray:
    """Share of the shorter text's runs of eight words that the other text has too, (left, right)."""
    runs = word_runs([normalise(text) for text in [*left, *right]])
    sizes = np.diff(runs.indptr)
    shared = (runs[: len(left)] @ runs[len(left) :].T).toarray()
    return shared / np.minimum.outer(sizes[: len(left)], sizes[len(left) :])


def _leaks(texts: pd.Series, in_test: np.ndarray) -> set[str]:
    test, train = texts[in_test], texts[~in_test]
    return set(test.index[(_shares(test, train) >= 0.5).any(axis=1)])


def _removed(hidden: torch.Tensor, count: int) -> set[int]:
    cosines = torch.cosine_similarity(hidden[: len(hidden) - count], hidden[count:], dim=-1)
    stay = distillation.remove_block(cosines.clamp(-1, 1).arccos().mean(-1).tolist(), count)
    return set(range(len(hidden))) - set(stay)


def _squares(weight: torch.Tensor, levels: torch.Tensor) -> float:
    blocks = weight.reshape(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = levels[torch.bucketize(blocks / scales, (levels[1:] + levels[:-1]) / 2)]
    return float((blocks - scales * nearest).square().sum())


def _weighed(check: Checks, variant: str, column: str) -> int:
    return int(check.table("04_quantization/ledger", variant=variant)[column].sum())


def _padding(lengths: np.ndarray) -> float:
    batches = np.split(lengths, range(8, len(lengths), 8))
    return 1 - lengths.sum() / sum(len(batch) * batch.max() for batch in batches)


def _deletions(attributions: dict, drawn: list, score: Callable, interval: Callable) -> list:
    counts, rows = [len(numbers) for numbers in drawn[0]], []
    for name, by_question in attributions.items():
        highest = [np.argsort(by_token)[-count:] for by_token, count in zip(by_question, counts, strict=True)]
        by_chance = np.mean([score(name, numbers) for numbers in drawn], axis=0)
        rows.append(interval(by_chance - score(name, highest)))
    return rows


def _medprompt(in_orders: pd.DataFrame, right: dict, compared: list, asked: pd.DataFrame) -> np.ndarray:
    by_vote, in_own_order = {}, {}
    for id, rows in in_orders.groupby("id"):
        options = [order[place] if place >= 0 else -1 for order, place in zip(rows.order, rows.place, strict=True)]
        votes = [option for option in options if option >= 0]
        in_own_order[id], by_vote[id] = options[0], max(votes, key=votes.count, default=-1)
    chosen = {"examples": in_own_order, "Medprompt": by_vote}
    right = right | {way: (asked.id.map(options) == asked.answer).to_numpy() for way, options in chosen.items()}
    change = np.column_stack([right[ours].astype(int) - right[theirs] for ours, theirs in compared])
    ends = statistics.mean_intervals(change, asked.group, 0.95, imagined=(-1, 1))
    return np.column_stack([change.mean(0), *ends])


Q4, Q5 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q5_0
TRUTHS = {
    "1.2": lambda check, texts, in_test: _leaks(texts, in_test),
    "1.3": lambda check, test, train: [test.group.isin(train.group).sum(), test.group.nunique()],
    "1.5": lambda check: np.quantile(
        check.table("01_data/questions", split="test").prompt_tokens, 0.9, method="inverted_cdf"
    ),
    "2.1": lambda check, student, teacher, k: distillation.sparse_divergence(
        student.double(), *distillation.top_k_logprobs(teacher.double(), k)
    ),
    "2.2": lambda check, vocab_size: [
        pd.read_csv(check.path("02_distillation/figures/kept_mass.csv"))["50 %"].iloc[-1],
        2 * vocab_size / Stage(check.run, "02_distillation").manifest()["facts"]["signal_bytes_per_token"],
    ],
    "2.3": lambda check, p, q, ts: [float(t * ((q / t).softmax(0) - (p / t).softmax(0)).norm()) for t in ts],
    "2.4": lambda check, hidden, count: _removed(hidden, count),
    "2.5": lambda check, **scores: [
        statistics.gap_closed(**scores, confidence=0.95)[name] for name in ("gap", "share", "ci_low", "ci_high")
    ],
    "2.6": lambda check, **given: _deletions(**given),
    "3.1": lambda check, weights, rank: [weights / rank * other for other in (4, 16, 64)],
    "3.3": lambda check, alpha: [2 * alpha, alpha],
    "3.4": lambda check: pd.read_csv(check.path("03_lora/figures/update_spectrum.csv")).groupby(["layer", "kind"])
    .share.agg(lambda shares: 1 + (shares.cumsum() < 0.9).sum()).median(),
    "4.1": lambda check, block: gguf.dequantize(gguf.quantize(block.numpy()[None], Q5), Q5)[0],
    "4.2": lambda check: [18 / 32, 22 / 32, 34 / 32, 1 / 2 + 1 / 64 + 4 / (64 * 256)],
    "4.3": lambda check, raw: gguf.dequantize(raw[None], Q4)[0],
    "4.4": lambda check, weight, levels: _squares(weight, torch.linspace(-1, 1, 16)) / _squares(weight, levels),
    "5.1": lambda check, **row: list(check.table("05_inference/predictions", **row).logprobs.iloc[0]),
    "5.2": lambda check, answers, questions: list(judge(answers, questions).groupby("scoring").correct.mean()),
    "5.3": lambda check, bandwidth, width: [
        bandwidth / (width * _weighed(check, "student_kd", "weights")), bandwidth / _weighed(check, "edge", "bytes")
    ],
    "5.4": lambda check, lengths: [_padding(lengths), _padding(np.sort(lengths))],
    "5.6": lambda check, **given: _medprompt(**given),
    "6.1": lambda check, right: statistics.wilson(right.sum(), len(right), 0.95),
    "6.2": lambda check, values, counts: [
        values.mean(), *np.quantile(counts @ values / counts.sum(1), [0.025, 0.975])
    ],
    "6.3": lambda check, pair, **levels: questions_needed(pair.assign(margin=pair.margin / 2), **levels).iloc[0],
    "6.4": lambda check, **row: check.table("06_evaluation/calibration", metric="ece", **row)
    [["value", "ece_if_calibrated"]].iloc[0].tolist(),
}  # fmt: skip
# what is checked is a function or a choice, by what it achieves
BARS = {
    "1.1": lambda share, texts: _close([[share(a, b) for b in texts] for a in texts], _shares(texts, texts), 1e-6),
    "1.4": lambda read, cases: all(read(row, columns) == wanted for row, columns, wanted in cases),
    "3.2": lambda logits, plain, merged: (logits - merged).norm() <= 0.05 * (plain - merged).norm(),
    "3.5": lambda ranks, cost, loss, half: cost(ranks) <= cost(half) and loss(ranks) < loss(half),
    "4.5": lambda result, simple: result["share"] <= 0.31 and result["p"] >= 0.05 and result["kl"] < simple["kl"],
    "5.5": lambda cut, cost, lengths, limit: cost(cut(lengths, limit)) <= 1.02 * cost(bucket_by_length(lengths, limit)),
    "6.5": lambda n: 0.028 < statistics.detectable_effect(int(n), 0.1, 0.95, 0.8) < 0.032,
}
