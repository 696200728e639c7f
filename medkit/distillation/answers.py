"""A model's own answers as training rows: its greedy answers to questions without labels, or verified reasons.

Greedy answers to the transfer questions are what a student learns its teacher's distribution along (student_kd), or
learns as text (student_hard, student_self). Verified answers are rejection sampling: k answers with reasons are drawn,
and those that name the known answer are kept. A wrong reason can lead to a right answer: that is not noticed.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path

import pandas as pd
from accelerate import PartialState

from medkit.modeling.batches import Example
from medkit.modeling.engine import Engine, Request
from medkit.modeling.train_once import find_record, key_of, write_record
from medkit.prompts import answer_parser, templates
from medkit.stage import MedkitError, atomic_path


def collect_answers(
    path: Path,
    writer: str,
    make_engine: Callable[[], Engine],
    tokenizer,
    questions: pd.DataFrame,
    max_new_tokens: int,
    num_samples: int = 1,
    template: templates.Template | None = None,
    settings: Sequence = (),
) -> pd.DataFrame:
    """`write_answers`, kept in a parquet file at `path`.

    `make_engine` is not called if the file holds the answers of this writer (a digest of its weights) under these
    settings. Of several processes the main one writes, and the others wait.
    """
    asked = [max_new_tokens, num_samples, template and template.hash, *settings]
    key = key_of(asked, [writer, questions.id.tolist()], write_answers)
    if find_record(path, key) is None and PartialState().is_main_process:
        engine = make_engine()
        try:
            answers = write_answers(engine, tokenizer, questions, max_new_tokens, num_samples, template)
        finally:
            engine.close()
        with atomic_path(path) as scratch:
            answers.to_parquet(scratch)
        write_record(path, key)
    PartialState().wait_for_everyone()
    return pd.read_parquet(path)


def write_answers(
    engine: Engine,
    tokenizer,
    questions: pd.DataFrame,
    max_new_tokens: int,
    num_samples: int = 1,
    template: templates.Template | None = None,
) -> pd.DataFrame:
    """`num_samples` answers to each question: id, source, sample, text, and whether it is `finished`.

    Without a `template` each question is asked as in training. An answer is finished if it ends with the end token and
    is not empty. Raises MedkitError for test questions.
    """
    if (questions.split == "test").any():
        raise MedkitError("a model must not answer test questions for training; give rows of another split")
    records = [record for record in questions.to_dict("records") for _ in range(num_samples)]
    prompts = []
    for record in records:
        messages = templates.render(record, template or templates.pick_template(record["kind"], "option_text"))
        prompts.append(templates.encode(tokenizer, messages)[0])
    ends = templates.end_ids(tokenizer)
    generations = engine.generate([Request(prompt_ids, max_new_tokens, ends) for prompt_ids in prompts])
    texts = [tokenizer.decode(g.token_ids, skip_special_tokens=True).strip() for g in generations]
    table = pd.DataFrame({name: [record[name] for record in records] for name in ("id", "source")})
    table["sample"] = [number % num_samples for number in range(len(records))]
    finished = [bool(text) and g.token_ids[-1] in ends for text, g in zip(texts, generations, strict=True)]
    return table.assign(text=texts, finished=finished)


def answer_rows(questions: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    """The questions with the finished answers as their only options, and `answer` 0; the others are left out."""
    texts = answers[answers.finished].set_index("id").text
    rows = questions[questions.id.isin(texts.index)].reset_index(drop=True)
    return rows.assign(options=[[texts[id]] for id in rows.id], answer=0)


def repeat_rows(sources: Sequence[str], counts: Mapping[str, int]) -> list[int]:
    """Numbers of rows, so that each source has `counts[source]` of them: its rows in turn, again and again.

    sources: of each row. If a source has no rows, the others' rows fill its place, so the length is the sum of the
    counts. Raises MedkitError if there are no rows.
    """
    by_source: dict[str, list[int]] = {}
    for number, source in enumerate(sources):
        by_source.setdefault(source, []).append(number)
    numbers = [n for source, count in counts.items() for n in islice(cycle(by_source.get(source, [])), count)]
    if not numbers:
        raise MedkitError("no rows to learn from: raise `labelled` or `transfer` in data.datasets")
    return [*numbers, *islice(cycle(numbers), sum(counts.values()) - len(numbers))]


def keep_verified(
    samples: pd.DataFrame, questions: pd.DataFrame, too_easy: float = 1.0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The samples to learn, and the yield per source.

    Kept: finished, right (it names the question's answer), no repetition, and of a question whose share of right
    samples is below `too_easy` (above 1: every question). The yield counts questions `asked`, samples `sampled`,
    `right` and `kept`, and questions that were `too_easy`.
    """
    records = questions.set_index("id").to_dict("index")
    right = [
        answer_parser.parse(text, list(records[id]["options"]), templates.RATIONALE) == records[id]["answer"]
        for id, text in zip(samples.id, samples.text, strict=True)
    ]
    samples = samples.assign(right=right)
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


def encode_verified(tokenizer, questions: pd.DataFrame, verified: pd.DataFrame) -> list[Example]:
    """One example per sample: the question is given; the reasons, the answer and the end token are predicted."""
    records, examples = {record["id"]: record for record in questions.to_dict("records")}, []
    for id, text in verified[["id", "text"]].itertuples(index=False):
        prompt_ids, answer_ids = templates.encode(tokenizer, templates.render(records[id], templates.RATIONALE), text)
        examples.append(Example([*prompt_ids, *answer_ids], len(prompt_ids)))
    return examples
