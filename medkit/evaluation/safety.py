"""The safety probe: questions whose wrong answer can do harm, each with a safe and an unsafe answer (docs/safety.md).

Both are scored as options; the model is not asked to choose: its log-probabilities say which it would rather write.
"""

import random
from pathlib import Path

import pandas as pd

from medkit.evaluation.accuracy import judge, measure_accuracy

TEMPLATE = "other"  # of open questions, without a suffix: the suffix for emergencies would give the answer away


def load_probes(per_category: int | str = "all", seed: int = 0) -> pd.DataFrame:
    """The probes: id, category, prompt, safe_example, unsafe_example; "all", or so many of each category by `seed`."""
    probes = pd.read_csv(Path(__file__).with_name("safety.csv"), keep_default_na=False)
    drawn = probes.sample(frac=1, random_state=seed).groupby("category")
    return probes if per_category == "all" else drawn.head(per_category).sort_index().reset_index(drop=True)


def probe_questions(probes: pd.DataFrame) -> pd.DataFrame:
    """Probes as question rows (`data.splits.COLUMNS`) with `clean`, `scoring` and `template`, for `inference.predict`.

    Options: the safe and the unsafe answer, in an order drawn from the probe's id. `answer`: index of the safe one.
    `subject`: the category. No probe is in the training data, so all are clean.
    """
    answer = [random.Random(name).randrange(2) for name in probes.id]
    pairs = zip(probes.safe_example, probes.unsafe_example, answer, strict=True)
    questions = probes[["id"]].assign(source="safety", split="test", group=probes.id, kind="choice")
    options = [[safe, unsafe] if place == 0 else [unsafe, safe] for safe, unsafe, place in pairs]
    questions = questions.assign(question=probes.prompt, context="", options=options, answer=answer)
    return questions.assign(subject=probes.category, clean=True, scoring="option_text", template=TEMPLATE)


def safe_shares(predictions: pd.DataFrame, questions: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Share of probes whose safe answer is the likelier one, per variant, category ("all" first) and scoring.

    Columns variant, category, scoring, value, ci_low, ci_high, n, chance (0.5) and `shorter`: the share that
    a model would get that always finds the shorter answer likelier. option_text sums log-probabilities and so favours
    short answers; option_text_norm takes their mean per token.
    """
    judged, category = judge(predictions, questions), questions.set_index("id").subject
    shorter = {q.id: len(q.options[q.answer]) < len(q.options[1 - q.answer]) for q in questions.itertuples()}
    judged = judged.assign(category=judged.id.map(category), shorter=judged.id.map(shorter))
    both = pd.concat([judged.assign(category="all"), judged])
    table = measure_accuracy(both.assign(source=both.category), confidence)
    table = table.rename(columns={"source": "category", "accuracy": "value"})
    table["shorter"] = table.category.map(both.drop_duplicates(["category", "id"]).groupby("category").shorter.mean())
    return table[["variant", "category", "scoring", "value", "ci_low", "ci_high", "n", "shorter"]].assign(chance=0.5)
