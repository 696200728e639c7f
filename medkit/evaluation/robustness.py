"""What the studies say: how far an answer depends on what should not matter, and how much asking better would bring.

Judged answers of `studies` → tidy tables with `value`, `ci_low`, `ci_high` and `n` questions. Beside each number stands
what a model without knowledge would get: one consistent answer in four can be much or nothing. No model runs here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from medkit.inference.question_variants import ORIGINAL, SWAPPED
from medkit.prompts.templates import LETTERS
from medkit.stage import MedkitError
from medkit.statistics import median_interval, paired_difference, resample_groups, wilson

BY = ["variant", "source", "scoring"]
AXES = ("question", "template", "scoring")
RESAMPLES = 1000


class RobustnessError(MedkitError):
    """Answers that a study cannot be read from."""


# --- order of the options ------------------------------------------------------------------------------------------


def shuffle_consistency(judged: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Share of questions answered with the same option under every order, with Wilson's interval.

    To read it by, the share expected of three models that do not read the options: one that always says the same
    letter (`constant_letter`), one that guesses evenly (`uniform`), one that picks letters as often as this one does
    (`own_letters`). `always_right`: right under every order; `accuracy`: mean over the orders; `orders`: the most a
    question had. An answer that names no option is consistent with nothing.
    """
    rows = []
    for key, group in _study(judged, "shuffle").groupby(BY, sort=False):
        order = group.condition.map(_order)
        place = [o.index(c) if c >= 0 else -1 for o, c in zip(order, group.choice, strict=True)]
        group = group.assign(order=order, place=place)
        questions = group.groupby("id", sort=False)
        same = (questions.choice.nunique() == 1) & (questions.choice.min() >= 0)
        rows.append(
            dict(zip(BY, key, strict=True))
            | _share(same, confidence)
            | _blind(group)
            | {"always_right": questions.correct.all().mean(), "accuracy": questions.correct.mean().mean()}
            | {"orders": int(questions.size().max())}
        )
    return pd.DataFrame(rows)


def _blind(group: pd.DataFrame) -> dict[str, float]:
    """Consistency expected of models that choose a place without reading what stands there."""
    expected = []
    sizes = group.groupby("id").order.agg(lambda orders: (len(orders.iloc[0]), len(orders)))
    for (options, orders), ids in sizes.groupby(sizes):
        rows = group[group.id.isin(ids.index)].sort_values("id", kind="stable")
        where = np.argsort(np.array(rows.order.tolist()).reshape(-1, orders, options), axis=2)  # place of each option
        own = np.bincount(rows.place[rows.place >= 0], minlength=options) / len(rows)
        chances = {"uniform": np.full(options, 1 / options), "own_letters": own}
        found = {name: chance[where].prod(axis=1).sum(axis=1) for name, chance in chances.items()}
        found["constant_letter"] = np.mean([row[where].prod(axis=1).sum(axis=1) for row in np.eye(options)], axis=0)
        expected.append(pd.DataFrame(found))
    return pd.concat(expected)[["constant_letter", "uniform", "own_letters"]].mean().to_dict()


def letter_bias(judged: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Accuracy by the place where the right answer stood, over all orders, and how often that letter was `chosen`.

    With the orders of `studies` a question stands at most once in each row. n: questions.
    """
    table = _study(judged, "shuffle")
    order = table.condition.map(_order)
    table = table.assign(
        letter=[LETTERS[o.index(a)] for o, a in zip(order, table.answer, strict=True)],
        said=[LETTERS[o.index(c)] if c >= 0 else "" for o, c in zip(order, table.choice, strict=True)],
    )
    rows = []
    for key, group in table.groupby(BY, sort=False):
        for letter, part in group.groupby("letter"):
            found = {"letter": letter, **_share(part.correct, confidence), "chosen": (group.said == letter).mean()}
            rows.append(dict(zip(BY, key, strict=True)) | found)
    return pd.DataFrame(rows)


# --- names of drugs ------------------------------------------------------------------------------------------------


def swap_drop(judged: pd.DataFrame, confidence: float, power: float) -> pd.DataFrame:
    """Accuracy under brand names minus under generic names of the same questions, paired.

    Columns of `statistics.paired_difference` with `difference` as `value`, both accuracies, and the share of questions
    whose answer `changed`, right or wrong, with Wilson's interval `changed_low`, `changed_high`.
    """
    rows = []
    for key, group in _study(judged, "swap").groupby(BY, sort=False):
        wide = group.pivot(index="id", columns="condition", values=["correct", "choice", "group"])
        before, after = (wide.correct[name].astype(bool) for name in (ORIGINAL, SWAPPED))
        found = paired_difference(after, before, confidence, power, groups=wide.group[ORIGINAL])
        changed = _share(wide.choice[ORIGINAL] != wide.choice[SWAPPED], confidence)
        rows.append(
            dict(zip(BY, key, strict=True))
            | {"value": found.pop("difference"), **found, ORIGINAL: before.mean(), SWAPPED: after.mean()}
            | {"changed": changed["value"], "changed_low": changed["ci_low"], "changed_high": changed["ci_high"]}
        )
    return pd.DataFrame(rows)


# --- wording and scoring -------------------------------------------------------------------------------------------


def ablation_table(judged: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Accuracy of each template under each scoring, with Wilson's interval, and the share that could not be read."""
    rows = []
    for key, group in _study(judged, "ablation").groupby([*BY, "condition"], sort=False):
        found = _share(group.correct, confidence) | {"unparsed_rate": (group.choice == -1).mean()}
        rows.append(dict(zip([*BY, "template"], key, strict=True)) | found)
    return pd.DataFrame(rows)


def prompt_range(judged: pd.DataFrame, confidence: float, power: float, seed: int = 0) -> pd.DataFrame:
    """Best minus worst accuracy over all ways of asking: what choosing the prompt after seeing the scores can bring.

    `ci_low`, `ci_high`: of the pair as if it had been named beforehand. It was not, so beside it stands the range that
    luck alone gives: `range_if_alike`, its mean when each question's verdicts are dealt out anew over the ways, and
    `p_value`, the share of such deals with at least this range.
    """
    rows = []
    for key, group in _study(judged, "ablation").groupby(BY[:2], sort=False):
        wide = group.pivot(index="id", columns=["condition", "scoring"], values="correct").dropna().astype(bool)
        if len(wide) < 2 or wide.shape[1] < 2:
            raise RobustnessError(f"{key}: {len(wide)} questions asked in all of {wide.shape[1]} ways; two are needed")
        means = wide.mean()
        best, worst = means.idxmax(), means.idxmin()
        pair = paired_difference(wide[best], wide[worst], confidence, power)
        draw, dealt = np.random.default_rng(seed), []
        for _ in range(RESAMPLES):
            dealt.append(np.ptp(draw.permuted(wide.to_numpy(), axis=1).sum(axis=0)))
        seen = np.ptp(wide.to_numpy().sum(axis=0))
        rows.append(
            dict(zip(BY, key, strict=False))
            | {"value": pair["difference"], "ci_low": pair["ci_low"], "ci_high": pair["ci_high"], "n": pair["n"]}
            | {"best": " × ".join(best), "worst": " × ".join(worst), "ways": wide.shape[1]}
            | {"range_if_alike": np.mean(dealt) / len(wide), "p_value": _p_value(dealt, seen)}
        )
    return pd.DataFrame(rows)


def _p_value(dealt: Sequence[float], seen: float) -> float:
    return (1 + np.sum(np.asarray(dealt) >= seen)) / (1 + len(dealt))


def variance_components(judged: pd.DataFrame, confidence: float, seed: int = 0) -> pd.DataFrame:
    """How far question, template, scoring and their interactions move whether an answer is right, per variant.

    A crossed random-effects analysis of variance with one answer per cell (Brennan 2001, Generalizability Theory):
    expected mean squares are solved for the variances. `value`: variance of the 0/1 verdict; `sd` its root, in points
    of accuracy; `share` of their sum; `estimate`: before a negative one, which means none, is set to 0. The interval is
    a percentile bootstrap over groups of questions. The residual holds the three-way interaction. n: questions.

    Where a template lacks a scoring there are two analyses, and `left_out` names what each is without: one of all
    templates, under the scorings that all have, and one of all scorings, of the templates that have all.
    """
    rows = []
    for key, group in _study(judged, "ablation").groupby(BY[:2], sort=False):
        for part, left_out in _full_grids(group):
            wide = (
                part.pivot(index="id", columns=["condition", "scoring"], values="correct").sort_index(axis=1).dropna()
            )
            shape = (len(wide), part.condition.nunique(), part.scoring.nunique())
            verdicts = wide.to_numpy(float).reshape(shape)
            groups = part.drop_duplicates("id").set_index("id").group[wide.index]
            about = {"n": shape[0], "templates": shape[1], "scorings": shape[2], "left_out": left_out}
            for found in _analysed(verdicts, groups, confidence, seed):
                rows.append(dict(zip(BY, key, strict=False)) | found | about)
    return pd.DataFrame(rows)


def _full_grids(group: pd.DataFrame) -> list[tuple[pd.DataFrame, str]]:
    """The answers without the scorings, or else without the templates, that leave gaps; and the names of those."""
    grids = {}
    for dropped, kept in (("scoring", "condition"), ("condition", "scoring")):
        counts = group.groupby(dropped)[kept].nunique()
        gaps = counts.index[counts < group[kept].nunique()]
        part = group[~group[dropped].isin(gaps)]
        if part.id.nunique() > 1 and part.condition.nunique() > 1 and part.scoring.nunique() > 1:
            grids.setdefault(", ".join(gaps), part)
    if not grids:
        raise RobustnessError(
            f"{group.variant.iloc[0]}, {group.source.iloc[0]}: variances need two questions, and two templates under "
            f"the same two scorings; there are {', '.join(sorted(set(group.condition + ' × ' + group.scoring)))}"
        )
    return [(part, left_out) for left_out, part in grids.items()]


def _analysed(verdicts: np.ndarray, groups: pd.Series, confidence: float, seed: int) -> Iterator[dict]:
    """One row per component of balanced verdicts (questions, templates, scorings)."""
    squares, freedom = sums_of_squares(verdicts)
    found = components(verdicts)
    times = itertools.chain.from_iterable(resample_groups(groups, RESAMPLES, seed))
    again = pd.DataFrame([components(np.repeat(verdicts, row, axis=0)) for row in times if row.astype(bool).sum() > 1])
    total = sum(max(0.0, estimate) for estimate in found.values())
    for name, estimate in found.items():
        value = max(0.0, estimate)
        low, high = np.quantile(again[name].clip(lower=0), [(1 - confidence) / 2, (1 + confidence) / 2])
        yield {
            "component": name,
            "value": value,
            "ci_low": min(low, value),
            "ci_high": max(high, value),
            "sd": np.sqrt(value),
            "share": value / total if total else 0.0,
            "estimate": estimate,
            "sum_of_squares": squares[name],
            "df": freedom[name],
        }


def sums_of_squares(values: np.ndarray) -> tuple[dict[str, float], dict[str, int]]:
    """Sum of squares and degrees of freedom of each effect of balanced values (questions, templates, scorings)."""
    axes = range(values.ndim)
    means = {kept: values.mean(axis=tuple(set(axes) - set(kept)), keepdims=True) for kept in _subsets(axes)}
    squares, freedom = {}, {}
    for effect in _subsets(axes)[1:]:
        # what is left of the mean of a cell when all that its margins say is taken away
        deviation = sum((-1) ** (len(effect) - len(kept)) * means[kept] for kept in _subsets(effect))
        squares[_name(effect)] = float((deviation**2).sum() * values.size / deviation.size)
        freedom[_name(effect)] = int(np.prod([values.shape[axis] - 1 for axis in effect]))
    return squares, freedom


def components(values: np.ndarray) -> dict[str, float]:
    """Variance of each effect, unbiased and so possibly negative, from its mean square and those that contain it.

    E[MS of an effect] = Σ over the effects that contain it of (values per level of that effect) · its variance.
    """
    squares, freedom = sums_of_squares(values)
    mean = {name: squares[name] / freedom[name] for name in squares}
    found, effects = {}, _subsets(range(values.ndim))[1:]
    for effect in effects:
        above = [other for other in effects if set(effect) <= set(other)]
        total = sum((-1) ** (len(other) - len(effect)) * mean[_name(other)] for other in above)
        found[_name(effect)] = total * np.prod([values.shape[axis] for axis in effect]) / values.size
    return found


def _subsets(axes: Sequence[int]) -> list[tuple[int, ...]]:
    return [kept for size in range(len(axes) + 1) for kept in itertools.combinations(axes, size)]


def _name(effect: Sequence[int]) -> str:
    return "residual" if len(effect) == len(AXES) else " × ".join(AXES[axis] for axis in effect)


# --- asking with help ----------------------------------------------------------------------------------------------


def ensemble_line(judged: pd.DataFrame, confidence: float, power: float) -> pd.DataFrame:
    """Accuracy of the plain question, with solved examples before it, and averaged over orders, on the same questions.

    `line`: zero-shot, few-shot (one order), ensemble (the option with the highest mean probability over all orders).
    `difference` … `mde`: each line minus zero-shot, paired (`statistics.paired_difference`).
    """
    table = _study(judged, "ensemble")
    told = table.condition.str.extract(r"^shots=(?P<shots>\d+) order=(?P<order>\d+)$")
    table = table.assign(
        shots=told.shots.astype(int), own=[list(_order(c)) == sorted(_order(c)) for c in table.condition]
    )
    rows = []
    for key, group in table.groupby(BY, sort=False):
        helped = group[group.shots == group.shots.max()]
        mean = helped.groupby("id").probabilities.agg(lambda p: np.mean(np.stack(p.tolist()), axis=0).argmax())
        answer = helped.drop_duplicates("id").set_index("id").answer[mean.index]
        plain = group[(group.shots == 0) & group.own].set_index("id").correct
        lines = {"zero-shot": plain, "few-shot": helped[helped.own].set_index("id").correct, "ensemble": mean == answer}
        for line, correct in lines.items():
            pair = paired_difference(correct[plain.index], plain, confidence, power)
            pair |= {"difference_low": pair.pop("ci_low"), "difference_high": pair.pop("ci_high")}
            counts = {"shots": 0 if line == "zero-shot" else group.shots.max()}
            counts["orders"] = int(helped.groupby("id").size().max()) if line == "ensemble" else 1
            rows.append(dict(zip(BY, key, strict=True)) | {"line": line} | counts | pair | _share(correct, confidence))
    return pd.DataFrame(rows)


# --- length --------------------------------------------------------------------------------------------------------


def answer_lengths(
    predictions: pd.DataFrame, questions: pd.DataFrame, max_new_tokens: int, confidence: float
) -> pd.DataFrame:
    """Tokens of generated answers, end token included, by template: median with bootstrap interval, p95, and words.

    `at_limit`: share as long as `max_new_tokens` lets them be, most of them cut; where it is large, the others are the
    length of the limit and not of the answer.
    """
    table = predictions[predictions.scoring == "generated"].merge(questions[["id", "source"]], on="id")
    rows = []
    for key, group in table.groupby([*BY, "template"], sort=False):
        tokens, words = group.answer_tokens.str[0], group.text.str.split().str.len()
        if tokens.isna().any():
            raise RobustnessError("generated answers without their lengths in tokens: run notebook 05 again")
        value, low, high = median_interval(tokens, confidence)
        found = {"value": value, "ci_low": low, "ci_high": high, "n": len(group), "p95": tokens.quantile(0.95)}
        found |= {"at_limit": (tokens >= max_new_tokens).mean(), "words": words.median()}
        rows.append(dict(zip([*BY, "template"], key, strict=True)) | found)
    return pd.DataFrame(rows)


def _study(judged: pd.DataFrame, study: str) -> pd.DataFrame:
    table = judged[judged.study == study]
    if table.empty:
        raise RobustnessError(f"no answers of the study {study!r} here; there are {sorted(set(judged.study))}")
    return table


def _order(condition: str) -> tuple[int, ...]:
    """The order that a condition of `studies` tells: the option at each place."""
    return tuple(map(int, condition.rpartition("order=")[2]))


def _share(flags: pd.Series, confidence: float) -> dict:
    low, high = wilson(int(flags.sum()), len(flags), confidence)
    return {"value": float(flags.mean()), "ci_low": low, "ci_high": high, "n": len(flags)}
