"""Sequence distillation: a teacher's own answers with their reasons, of which only the verified ones are learned.

Rejection sampling: k answers per question are drawn, read by `parsing`, and kept if they name the known answer and end
by themselves. A question that is answered right every time teaches little and is left out. This is the baseline that
learning from signals has to beat. A wrong reason may lead to a right answer: nothing here notices that.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pandas as pd

from medkit.modeling.batches import Example
from medkit.modeling.engine import Engine, Request
from medkit.params import RationaleParams, digest
from medkit.prompts import answer_parser, templates
from medkit.stage import atomic_path

TEMPLATE = templates.RATIONALE


# --- what the teacher writes -----------------------------------------------------------------------------------------


def collect_samples(
    path: Path,
    speaker: str,
    make_engine: Callable[[], Engine],
    tokenizer,
    questions: pd.DataFrame,
    section: RationaleParams,
    seed: int,
) -> pd.DataFrame:
    """`sample_rationales` of as many of the questions as the section asks for, kept in a parquet file at `path`.

    `make_engine` gives the engine, at the section's temperature and with its own dice; it is not called if the file
    holds what this `speaker` (a hash of the teacher) said to the same questions under the same section and seed.
    """
    if section.questions != "all":
        questions = questions.sample(min(section.questions, len(questions)), random_state=seed)
    asked = section.model_dump(exclude={"too_easy"})  # which bars some of what was said from being learned
    key = digest([speaker, TEMPLATE.hash, asked, seed, questions.id.tolist()])
    if path.is_file():
        kept = pd.read_parquet(path)
        if kept.attrs.get("key") == key:
            return kept
    engine = make_engine()
    try:
        sampled = sample_rationales(engine, tokenizer, questions, section.samples, section.max_new_tokens)
    finally:
        engine.close()
    sampled.attrs["key"] = key
    with atomic_path(path) as scratch:
        sampled.to_parquet(scratch)
    return sampled


def sample_rationales(
    engine: Engine, tokenizer, questions: pd.DataFrame, samples: int, max_new_tokens: int
) -> pd.DataFrame:
    """`samples` answers to each question: id, source, sample, text, whether it is `finished` and `right`.

    Give an engine with a temperature: a greedy one says the same `samples` times. All are asked for at once, so that
    continuous batching reads each prompt once. Raises ValueError for questions whose answer is not known, or that are
    test material.
    """
    if (questions.answer < 0).any() or (questions.split == "test").any():
        refused = questions[(questions.answer < 0) | (questions.split == "test")]
        raise ValueError(
            f"{len(refused)} of {len(questions)} questions (e.g. {refused.id.iloc[0]}) have no known answer or are for "
            f"testing: give rows of data.training_rows(…, 'train')"
        )
    rows = [row for row in questions.to_dict("records") for _ in range(samples)]
    end = tokenizer.eos_token_id
    asked = [templates.encode(tokenizer, templates.render(row, TEMPLATE))[0] for row in rows]
    said = engine.generate([Request(prompt_ids, max_new_tokens, (end,)) for prompt_ids in asked])
    found = []
    for number, (row, generation) in enumerate(zip(rows, said, strict=True)):
        text = tokenizer.decode(generation.token_ids, skip_special_tokens=True).strip()
        choice = answer_parser.parse(text, list(row["options"]), TEMPLATE)
        found.append(
            {
                "id": row["id"],
                "source": row["source"],
                "sample": number % samples,
                "text": text,
                "finished": generation.token_ids[-1:] == [end],
                "right": choice == row["answer"],
            }
        )
    return pd.DataFrame(found, columns=["id", "source", "sample", "text", "finished", "right"])


# --- what is learned of it -------------------------------------------------------------------------------------------


def keep_verified(sampled: pd.DataFrame, too_easy: float = 1.0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows worth learning, and the yield per source.

    Kept: finished, right, not said before to the same question, and of a question whose share of right samples is
    below `too_easy` (above 1: every question). The yield counts questions `asked`, samples `sampled`, `right` and
    `kept`, and questions that were `too_easy`.
    """
    easy = sampled.groupby("id").right.transform("mean") >= too_easy
    good = sampled[sampled.finished & sampled.right & ~easy]
    kept = good.drop_duplicates(["id", "text"])
    by_source = sampled.groupby("source")
    counts = {
        "asked": by_source.id.nunique(),
        "sampled": by_source.size(),
        "right": by_source.right.sum(),
        "kept": kept.groupby("source").size(),
        "too_easy": sampled[easy].groupby("source").id.nunique(),
    }
    return kept.reset_index(drop=True), pd.DataFrame(counts).fillna(0).astype(int).reset_index()


def choose_examples(
    tokenizer, questions: pd.DataFrame, sampled: pd.DataFrame, too_easy: float, num_predicted: int
) -> tuple[list[Example], pd.DataFrame]:
    """Sequence distillation's examples, and the yield per source (`keep_verified`).

    The verified samples in turn, again and again until they have `num_predicted` tokens to learn: as many as another
    student learns, so that the two can be compared. No examples if nothing was verified.
    """
    kept, counts = keep_verified(sampled, too_easy)
    chosen, learned = [], 0
    for example in cycle(encode_rationales(tokenizer, questions, kept)):
        if learned >= num_predicted:
            break
        chosen.append(example)
        learned += example.num_predicted
    return chosen, counts


def encode_rationales(tokenizer, questions: pd.DataFrame, kept: pd.DataFrame) -> list[Example]:
    """One example per kept row: the question is given, the reasons, the answer and the end token are learned."""
    rows = {row["id"]: row for row in questions.to_dict("records")}
    return [_encode(tokenizer, rows[id], text) for id, text in kept[["id", "text"]].itertuples(index=False)]


def _encode(tokenizer, question: dict, text: str) -> Example:
    prompt_ids, answer_ids = templates.encode(tokenizer, templates.render(question, TEMPLATE), text)
    return Example([*prompt_ids, *answer_ids], len(prompt_ids))
