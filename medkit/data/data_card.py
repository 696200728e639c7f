"""The data card: what a table of questions holds, where it comes from, and what was rejected."""

import pandas as pd

from medkit.stage import DISCLAIMER

LICENCES = {"icd": "public domain (CMS); wheel: MIT", "medmcqa": "Apache-2.0"}  # as the sources published them
LICENCES |= dict.fromkeys(("medqa", "pubmedqa", "mmlu"), "MIT")


def licence_of(source: str) -> str:
    """The licence of a source by the first part of its name; medkit does not know the licence of a user's own file."""
    return LICENCES.get(source.split("_")[0], "not known to medkit: ask whoever made the file")


def build_card(table: pd.DataFrame, rejected: pd.DataFrame, contamination: pd.DataFrame) -> dict:
    """The card as plain values for json.

    `table` has `splits.COLUMNS`, `prompt_tokens` and `clean`; `contamination` comes from `contamination_table`.
    `commonest_place` is the share of the most frequent place of the right answer: far above 1 / options, a model can
    guess without knowledge.
    """
    labelled = table[table.answer >= 0].groupby("source").answer
    by_source = table.groupby("source")
    sources = table.pivot_table(index="source", columns="split", values="id", aggfunc="count", fill_value=0).assign(
        groups=by_source.group.nunique(),
        subjects=by_source.subject.nunique(),
        median_options=by_source.options.agg(lambda options: int(options.str.len().median())),
        median_prompt_tokens=by_source.prompt_tokens.median(),
        commonest_place=labelled.agg(lambda answers: answers.value_counts(normalize=True).iloc[0]),
        clean_test=table[table.split == "test"].groupby("source").clean.mean(),
        licence=lambda card: card.index.map(licence_of),
    )
    return {
        "disclaimer": DISCLAIMER,
        "questions": len(table),
        "groups": int(table.group.nunique()),
        "sources": sources.astype(object).where(sources.notna(), None).to_dict("index"),  # json has no NaN
        "subjects": {name: subjects.value_counts().to_dict() for name, subjects in by_source.subject},
        "rejected": rejected.to_dict("records"),
        "contamination": contamination.to_dict("records"),
    }
