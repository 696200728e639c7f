"""Answers that are records, one JSON object of the form of their kind (`prompts.FORMS`) → each field judged; rates.

An answer that is no such object holds no values. Texts are compared without case and extra spaces, numbers by value.
"""

import json
import math
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from medkit.data.consultations import NUMBERS
from medkit.evaluation.accuracy import STEP_COLUMNS, compare_steps, judge
from medkit.prompts import answer_parser, templates
from medkit.statistics import resample_groups, share_interval
from medkit.variants import STEPS

# metric → the columns whose sums over the fields of all records are divided
METRICS = {
    "field_f1": ("found_twice", "given_and_required"),
    "field_accuracy": ("correct", "fields"),
    "exact": ("exact", "fields"),
    "valid": ("valid", "fields"),
    "invented": ("invented", "given"),
    "missing": ("missing", "required"),
    "left_empty": ("left_empty", "empty"),
    "tokens": ("tokens", "fields"),
}
ENDS = ["ci_low", "ci_high"]
OF_WHOLE_RECORDS = ("exact", "valid")  # 0 or 1 for each record
CONVERTED = ("sex", "sx", "band", "days", "g")  # fields whose value need not stand in the dialogue as it is
SPELLED = {word: str(number) for number, word in enumerate(NUMBERS) if number}
SCORE_COLUMNS = [
    *("variant", "source", "id", "group", "valid", "exact", "tokens", "field", "gold", "answer", "required", "given"),
    *("correct", "missing", "invented"),
]
NOTHING = re.compile(r"\b(?:no|none|not|nkda|denies|denied|negative)\b", re.IGNORECASE)


def score_records(predictions: pd.DataFrame, questions: pd.DataFrame) -> pd.DataFrame:
    """One row per variant, record and field of the predictions that are for records.

    predictions: rows of `inference.predict` with a column `variant`. questions: the table of notebook 01; the first
    option is the true record. Columns: variant, source, id, group, field, gold and answer (text, or None);
    `required` (gold has a value), `given` (the answer has one), `correct` (both are equal, or both have none),
    `missing` (required, not given), `invented` (given, but gold has no value, or it is wrong and not in the dialogue; a
    wrong value of CONVERTED is not invented);
    and of the whole record `valid` (it has the form), `exact` (all fields correct) and `tokens` (of the answer).
    """
    truths = questions[questions.kind.isin(list(templates.FORMS))]
    table = predictions.merge(truths[["id", "source", "group", "kind", "question", "options"]], on="id")
    rows = []
    for row in table.to_dict("records"):
        gold = json.loads(row["options"][0])
        record = answer_parser.parse_record(row["text"], templates.FORMS[row["kind"]])
        answer = {} if record is None else record.model_dump(mode="json", by_alias=True)
        tokens = row.get("answer_tokens")
        whole = {name: row[name] for name in ("variant", "source", "id", "group")} | {"valid": record is not None}
        fields = [
            {"field": name} | _judge(name, value, answer.get(name), record is not None, row["question"])
            for name, value in gold.items()
        ]
        whole |= {"exact": all(field["correct"] for field in fields)}
        whole |= {"tokens": tokens[0] if tokens is not None and len(tokens) else None}
        rows += [whole | field for field in fields]
    return pd.DataFrame(rows, columns=SCORE_COLUMNS).astype({"tokens": float})


def _judge(field: str, gold, answer, valid: bool, dialogue: str) -> dict:
    correct, required, given = valid and same_value(gold, answer), gold is not None, answer is not None
    copied = field not in CONVERTED
    return {
        "gold": None if gold is None else str(gold),
        "answer": None if answer is None else str(answer),
        "required": required,
        "given": given,
        "correct": correct,
        "missing": required and not given,
        "invented": given and not correct and (not required or (copied and not occurs_in(answer, dialogue))),
    }


def same_value(left, right) -> bool:
    """Whether two values of a field are equal: no value, the same number, or the same text."""
    if left is None or right is None:
        return left is right
    if (number := _number(left)) is not None:
        return number == _number(right)
    return answer_parser.normalise(str(left)) == answer_parser.normalise(str(right))


def _number(value) -> float | None:
    try:
        return number if math.isfinite(number := float(value)) else None  # "nan" and "infinity" are words
    except (ValueError, OverflowError):
        return None


def occurs_in(value, text: str) -> bool:
    """Whether the value stands in the text as whole words. "six" and "6", "milligrams" and "mg" are the same word."""
    number = _number(value)
    words = _plain(str(value) if number is None else f"{number:.15g}")
    return bool(re.search(rf"(?<![\w.]){re.escape(words)}(?!\w|\.\d)", _plain(text)))


def _plain(text: str) -> str:
    words = answer_parser.normalise(text).replace("milligrams", "mg")
    return re.sub("|".join(rf"\b{word}\b" for word in SPELLED), lambda match: SPELLED[match[0]], words)


def measure_records(scores: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Rows variant, source, metric, value, ci_low, ci_high, n (records), from the table of `score_records`.

    field_f1: 2 · (right values) / (values given + values required), over all records. field_accuracy: share of fields
    that are correct, empty ones included. exact, valid: shares of records. invented: share of the given values.
    missing: share of the required ones. left_empty: share of the fields that should be empty and are, which F1 does not
    count. tokens: mean per record. The intervals are a bootstrap over groups of records. Two perfect and two failed
    records are added for the shares of whole records, and wherever an interval has width 0: an F1 varies too little
    from record to record for them. NaN where nothing is to be divided by.
    """
    right = scores.correct & scores.given
    counts = scores.assign(fields=1, found_twice=2 * right, given_and_required=1 * scores.given + scores.required)
    counts = counts.assign(empty=~scores.required, left_empty=scores.correct & ~scores.required)
    columns, tables = sorted({name for pair in METRICS.values() for name in pair}), []
    for source, part in counts.astype(dict.fromkeys(columns, float)).groupby("source", sort=False):
        records = part.groupby(["variant", "id"], sort=False)[columns].sum(min_count=1)
        groups = part.groupby("id").group.first()
        for metric, names in METRICS.items():
            above, below = (records[name].unstack("variant").loc[groups.index] for name in names)
            rates, wide = (ratio_of_sums(above, below, groups, confidence, imagined) for imagined in (False, True))
            flat = (rates.ci_low == rates.ci_high) & (metric != "tokens")
            rates[ENDS] = rates[ENDS].mask(flat | (metric in OF_WHOLE_RECORDS), wide[ENDS])
            tables.append(rates.assign(source=source, metric=metric))
    order = ["variant", "source", "metric", "value", "ci_low", "ci_high", "n"]
    return pd.concat(tables, ignore_index=True)[order] if tables else pd.DataFrame(columns=order)


def ratio_of_sums(
    above: pd.DataFrame, below: pd.DataFrame, groups: pd.Series, confidence: float, imagined: bool = False
) -> pd.DataFrame:
    """Sum of `above` over sum of `below`, (records, variants) each, with percentile intervals.

    imagined: two records at 0 and two at 1, of mean weight, are added for the interval.
    """
    n, names = above.notna().sum(), list(above)
    above, below, codes = above.fillna(0).to_numpy(), below.fillna(0).to_numpy(), pd.factorize(groups)[0]
    with np.errstate(invalid="ignore"):
        value = above.sum(0) / below.sum(0)
        if imagined:
            mean = np.tile(below.sum(0) / np.maximum(n.to_numpy(), 1), (4, 1))
            above, below = np.vstack([above, mean * [[0], [0], [1], [1]]]), np.vstack([below, mean])
            codes = np.append(codes, codes.max() + 1 + np.arange(4))
        drawn = np.vstack([(weights @ above) / (weights @ below) for weights in resample_groups(codes)])
    # pandas leaves out resamples with nothing to divide by
    low, high = pd.DataFrame(drawn).quantile([(1 - confidence) / 2, (1 + confidence) / 2]).to_numpy()
    intervals = {"ci_low": np.fmin(low, value), "ci_high": np.fmax(high, value)}
    return pd.DataFrame({"variant": names, "value": value, **intervals, "n": n.to_numpy()})


def compare_records(
    scores: pd.DataFrame, confidence: float, power: float, margin: float, steps: Sequence[tuple] = STEPS
) -> pd.DataFrame:
    """`accuracy.compare_steps` on the share of correct fields, paired by field, with records in groups."""
    if scores.empty:
        return pd.DataFrame(columns=STEP_COLUMNS)
    fields = scores.assign(id=scores.id + "/" + scores.field, scoring="generated")
    return compare_steps(fields, confidence, power, margin, steps)


def score_questions(predictions: pd.DataFrame, questions: pd.DataFrame) -> pd.DataFrame:
    """One score from 0 to 1 per variant and question: is the chosen option right, or the field F1 of the record.

    predictions: by `option_text`, and generated for records. Columns variant, source, id, group, score.
    """
    choices, keys = judge(predictions[predictions.scoring == "option_text"], questions), ["variant", "source", "id"]
    choices = choices[choices.scoring == "option_text"].assign(score=lambda table: table.correct.astype(float))
    tables = [choices[[*keys, "group", "score"]]]
    if (predictions.scoring == "generated").any():
        fields = score_records(predictions, questions)
        sums = fields.assign(right=fields.correct & fields.given).groupby([*keys, "group"], sort=False)
        sums = sums[["right", "given", "required"]].sum().astype(float)
        score = (2 * sums.right / (sums.given + sums.required)).fillna(1.0)  # nothing to write, and nothing written
        tables.append(score.rename("score").reset_index())
    return pd.concat(tables, ignore_index=True)


def score_dialogues(
    answers: pd.DataFrame, dialogues: pd.DataFrame, kind: str, confidence: float, sections: dict[str, str]
) -> pd.DataFrame:
    """Rows variant, metric, value, ci_low, ci_high, n: records of real dialogues, for which there is no true record.

    answers: `variant`, `id` and `text` of the records of this kind. dialogues: `01_data/dialogues.parquet`. valid:
    share of records that have the form. grounded: share of the given values that stand in the dialogue. sections: a
    field → the section header that a doctor wrote about it; `<field>_in_section` is the share of dialogues with that
    header where the value stands in the section's text, or where there is no value and the text says "no" or "none".
    Values of CONVERTED are not asked for.
    """
    rows = []
    for row in answers[["variant", "id", "text"]].merge(dialogues, on="id").itertuples():
        record = answer_parser.parse_record(row.text, templates.FORMS[kind])
        values = {} if record is None else record.model_dump(mode="json", by_alias=True)
        rows.append((row.variant, row.id, "valid", record is not None))
        given = [value for field, value in values.items() if value is not None and field not in CONVERTED]
        rows += [(row.variant, row.id, "grounded", occurs_in(value, row.dialogue)) for value in given]
        for field, header in sections.items():
            if row.section_header == header:
                value, text = values.get(field), row.section_text
                agrees = occurs_in(value, text) if value is not None else bool(values) and bool(NOTHING.search(text))
                rows.append((row.variant, row.id, f"{field}_in_section", agrees))
    table, results = pd.DataFrame(rows, columns=["variant", "id", "metric", "holds"]), []
    for (variant, metric), part in table.groupby(["variant", "metric"], sort=False):
        interval = share_interval(part.holds, part.id, confidence)
        results.append((variant, metric, part.holds.mean(), *interval, len(part)))
    return pd.DataFrame(results, columns=["variant", "metric", "value", "ci_low", "ci_high", "n"])
