"""The data card: what a table of questions holds, where it comes from, and what was found wrong with it.

Counts only; every number is computed from the tables that notebook 01 made. Licences are as published by the sources.
"""

from __future__ import annotations

import pandas as pd

from medkit.stage import DISCLAIMER

LICENCES = {
    "icd": "public domain (CMS); wheel: MIT",
    "medqa": "MIT",
    "medmcqa": "Apache-2.0",
    "pubmedqa": "MIT",
    "mmlu": "MIT",
}


def licence_of(source: str) -> str:
    """The licence of a source by the first part of its name; a user's own file is the user's business."""
    return LICENCES.get(source.split("_")[0], "not known to medkit: ask whoever made the file")


def describe_sources(table: pd.DataFrame) -> pd.DataFrame:
    """One row per source: questions per split, groups, subjects, median length, share of the commonest answer place.

    `table` has the columns of `data.COLUMNS` and `prompt_tokens`. An answer place far above 1 / options is a hint that
    a model can use without knowing anything.
    """
    counts = table.pivot_table(index="source", columns="split", values="id", aggfunc="count", fill_value=0)
    by_source = table.groupby("source")
    labelled = table[table.answer >= 0].groupby("source")
    more = pd.DataFrame(
        {
            "groups": by_source.group.nunique(),
            "subjects": by_source.subject.nunique(),
            "median_options": by_source.options.agg(lambda options: int(options.str.len().median())),
            "median_prompt_tokens": by_source.prompt_tokens.median(),
            "commonest_place": labelled.answer.agg(lambda answers: answers.value_counts(normalize=True).iloc[0]),
            "clean_test": table[table.split == "test"].groupby("source").clean.mean(),
            "licence": {source: licence_of(source) for source in by_source.groups},
        }
    )
    return counts.join(more)


def build_card(table: pd.DataFrame, rejected: pd.DataFrame, contamination: pd.DataFrame) -> dict:
    """The card as plain values for json; `contamination` is `contamination.contamination_table`'s result."""
    sources = describe_sources(table)
    return {
        "disclaimer": DISCLAIMER,
        "questions": len(table),
        "groups": int(table.group.nunique()),
        "sources": {name: _plain(row) for name, row in sources.iterrows()},
        "subjects": {name: rows.value_counts().to_dict() for name, rows in table.groupby("source").subject},
        "answer_places": {
            name: rows.value_counts().sort_index().to_dict()
            for name, rows in table[table.answer >= 0].groupby("source").answer
        },
        "prompt_tokens": {
            name: {f"p{q}": int(rows.quantile(q / 100)) for q in (5, 50, 95, 100)}
            for name, rows in table.groupby("source").prompt_tokens
        },
        "rejected": rejected.to_dict("records"),
        "contamination": contamination.to_dict("records"),
    }


def _plain(row: pd.Series) -> dict:
    """Numbers json can hold; a source without test questions has no clean share."""
    return {key: None if pd.isna(value) else getattr(value, "item", lambda v=value: v)() for key, value in row.items()}
