"""Sequence distillation: the teacher's own answers with their reasons; the student learns the verified ones.

This is rejection sampling: k answers to each question are drawn, and those that name the known answer and end with the
end token are kept. A question that is always answered correctly teaches little and is left out. A wrong reason can lead
to a right answer: that is not noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pandas as pd
from accelerate import PartialState

from medkit.modeling.batches import Example
from medkit.modeling.engine import Engine, Request
from medkit.modeling.train_once import find_record, key_of, write_record
from medkit.params import RationaleParams
from medkit.prompts import answer_parser, templates
from medkit.stage import MedkitError, atomic_path

TEMPLATE = templates.RATIONALE


def collect_samples(
    path: Path,
    teacher_key: str,
    make_engine: Callable[[], Engine],
    tokenizer,
    questions: pd.DataFrame,
    section: RationaleParams,
    seed: int,
) -> pd.DataFrame:
    """`sample_rationales` for as many of the questions as the section asks for, kept in a parquet file at `path`.

    `make_engine` is not called if the file holds the samples of this teacher, these settings and this seed. Of several
    processes the main one samples, and the others wait.
    """
    if section.questions != "all":
        questions = questions.sample(min(section.questions, len(questions)), random_state=seed)
    settings = section.model_dump(exclude={"too_easy"})  # which changes what is learned, not what is sampled
    key = key_of([settings, seed], [teacher_key, questions.id.tolist()], sample_rationales)
    if find_record(path, key) is None and PartialState().is_main_process:
        engine = make_engine()
        try:
            samples = sample_rationales(engine, tokenizer, questions, section.samples, section.max_new_tokens)
        finally:
            engine.close()
        with atomic_path(path) as scratch:
            samples.to_parquet(scratch)
        write_record(path, key)
    PartialState().wait_for_everyone()
    return pd.read_parquet(path)


def sample_rationales(
    engine: Engine, tokenizer, questions: pd.DataFrame, num_samples: int, max_new_tokens: int
) -> pd.DataFrame:
    """`num_samples` answers to each question: id, source, sample, text, whether it is `finished` and `right`.

    The engine needs a temperature: a greedy one repeats one answer. Raises MedkitError for questions without a known
    answer and for test questions.
    """
    refused = questions[(questions.answer < 0) | (questions.split == "test")]
    if len(refused):
        raise MedkitError(
            f"{len(refused)} of {len(questions)} questions (e.g. {refused.id.iloc[0]}) have no known answer or are for "
            f"testing; give rows of data.training_rows(…, 'labelled')"
        )
    records = [record for record in questions.to_dict("records") for _ in range(num_samples)]
    end = tokenizer.eos_token_id
    prompts = [templates.encode(tokenizer, templates.render(record, TEMPLATE))[0] for record in records]
    generations = engine.generate([Request(prompt_ids, max_new_tokens, (end,)) for prompt_ids in prompts])
    samples = []
    for number, (record, generation) in enumerate(zip(records, generations, strict=True)):
        text = tokenizer.decode(generation.token_ids, skip_special_tokens=True).strip()
        samples.append(
            {
                "id": record["id"],
                "source": record["source"],
                "sample": number % num_samples,
                "text": text,
                "finished": generation.token_ids[-1:] == [end],
                "right": answer_parser.parse(text, list(record["options"]), TEMPLATE) == record["answer"],
            }
        )
    return pd.DataFrame(samples, columns=["id", "source", "sample", "text", "finished", "right"])


def keep_verified(samples: pd.DataFrame, too_easy: float = 1.0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The samples to learn, and the yield per source.

    Kept: finished, right, no repetition, and of a question whose share of right samples is below `too_easy` (above 1:
    every question). The yield counts questions `asked`, samples `sampled`, `right` and `kept`, and questions that were
    `too_easy`.
    """
    easy = samples.groupby("id").right.transform("mean") >= too_easy
    verified = samples[samples.finished & samples.right & ~easy].drop_duplicates(["id", "text"])
    by_source = samples.groupby("source")
    counts = {
        "asked": by_source.id.nunique(),
        "sampled": by_source.size(),
        "right": by_source.right.sum(),
        "kept": verified.groupby("source").size(),
        "too_easy": samples[easy].groupby("source").id.nunique(),
    }
    return verified.reset_index(drop=True), pd.DataFrame(counts).fillna(0).astype(int).reset_index()


def encode_rationales(tokenizer, questions: pd.DataFrame, verified: pd.DataFrame) -> list[Example]:
    """One example per sample: the question is given; the reasons, the answer and the end token are predicted."""
    records, examples = {record["id"]: record for record in questions.to_dict("records")}, []
    for id, text in verified[["id", "text"]].itertuples(index=False):
        prompt_ids, answer_ids = templates.encode(tokenizer, templates.render(records[id], TEMPLATE), text)
        examples.append(Example([*prompt_ids, *answer_ids], len(prompt_ids)))
    return examples


def repeat_to_length(examples: list[Example], num_predicted: int) -> list[Example]:
    """The examples in turn, again and again, until they have `num_predicted` tokens to predict; [] for none.

    So a student of rationales learns as many tokens as the student it is compared with.
    """
    repeated, predicted = [], 0
    for example in cycle(examples):
        if predicted >= num_predicted:
            break
        repeated.append(example)
        predicted += example.num_predicted
    return repeated
