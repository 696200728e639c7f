"""The data card: what a table of questions holds, where it comes from, and what was rejected."""

import pandas as pd

from medkit.stage import DISCLAIMER

# as the sources published them
LICENCES = {"icd_chapter": "public domain (CMS); wheel: MIT", "medmcqa": "Apache-2.0"}
LICENCES |= dict.fromkeys(("medqa", "pubmedqa", "pubmedqa_a", "mmlu"), "MIT")
LICENCES |= dict.fromkeys(("records", "records_b"), "made by medkit; names of drugs and allergies: Apache-2.0")
NEARLY_ALL = 0.9


def licence_of(source: str) -> str:
    """The licence of a source by its name; medkit does not know the licence of a user's own file."""
    return LICENCES.get(source, "not known to medkit: ask whoever made the file")


def seen_notes(table: pd.DataFrame) -> dict[str, str]:
    """Source → a sentence, where nearly all right answers, or options, of its test rows are taught to a model.

    Taught are the options and the right answers of private and labelled rows. Then a model can name the answer without
    reading the question, and no near-duplicate of a test question is needed for that.
    """
    asked = table[table.kind.isin(["choice", "icd_chapter"]) & (table.answer >= 0)]
    asked = asked.assign(right=[options[answer] for options, answer in zip(asked.options, asked.answer, strict=True)])
    taught, notes = asked[asked.split.isin(["private", "labelled"])], {}
    seen = {"right answers": set(taught.right), "options": set(taught.options.explode())}
    for source, rows in asked[asked.split == "test"].groupby("source"):
        texts = {"right answers": rows.right, "options": rows.options.explode()}
        shares = {name: float(values.isin(seen[name]).mean()) for name, values in texts.items()}
        if max(shares.values()) >= NEARLY_ALL:
            overlap = " and ".join(f"{share:.0%} of the {name}" for name, share in shares.items())
            notes[source] = (
                f"{source}: {overlap} of its test questions are also those of taught rows. Its accuracy says little "
                f"about answers that were not taught. (In a table of your own with a `group`, groups are held out.)"
            )
    return notes


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
        "notes": [*seen_notes(table).values()],
        "rejected": rejected.to_dict("records"),
        "contamination": contamination.to_dict("records"),
    }
