"""Sequence distillation: a teacher's own answers with their reasons, of which only the verified ones are learned.

Rejection sampling: k answers per question are drawn, read by `parsing`, and kept if they name the known answer and end
by themselves. A question that is answered right every time teaches little and is left out. This is the baseline that
learning from signals has to beat. A wrong reason may lead to a right answer: nothing here notices that.
"""

from __future__ import annotations

import pandas as pd

from medkit import parsing, prompts
from medkit.batching import Example
from medkit.engines import Engine, Request

TEMPLATE = prompts.RATIONALE


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
    asked = [prompts.encode(tokenizer, prompts.render(row, TEMPLATE))[0] for row in rows]
    said = engine.generate([Request(prompt_ids, max_new_tokens, (end,)) for prompt_ids in asked])
    found = []
    for number, (row, generation) in enumerate(zip(rows, said, strict=True)):
        text = tokenizer.decode(generation.token_ids, skip_special_tokens=True).strip()
        choice = parsing.parse(text, list(row["options"]), TEMPLATE)
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


def encode_rationales(tokenizer, questions: pd.DataFrame, kept: pd.DataFrame) -> list[Example]:
    """One example per kept row: the question is given, the reasons, the answer and the end token are learned."""
    rows = {row["id"]: row for row in questions.to_dict("records")}
    return [_encode(tokenizer, rows[id], text) for id, text in kept[["id", "text"]].itertuples(index=False)]


def _encode(tokenizer, question: dict, text: str) -> Example:
    prompt_ids, answer_ids = prompts.encode(tokenizer, prompts.render(question, TEMPLATE), text)
    return Example([*prompt_ids, *answer_ids], len(prompt_ids))
