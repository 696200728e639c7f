"""A model's own answers as training rows: its greedy answers to questions without labels, or verified reasons.

Verified answers are rejection sampling: k answers with reasons are drawn, and of those that name the known answer the
shortest is kept. A wrong reason can lead to a right answer: that is not noticed.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from itertools import accumulate, cycle, islice, takewhile
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState

from medkit.modeling import loading
from medkit.modeling.batches import Example
from medkit.modeling.engine import WRITE_TOKENS, Engine, write
from medkit.modeling.train_once import find_record, key_of, recorded
from medkit.params import Params, ServerParams
from medkit.prompts import answer_parser, templates
from medkit.stage import MedkitError, StageError, atomic_path, sha256_of

MakeEngine = Callable[..., Engine]  # inference.make_engine, which stands below this room
PART_QUESTIONS = 64  # written at a time where several samples or thoughts are: what a killed run loses


def collect_answers(
    path: Path,
    writer: Path,
    params: Params,
    questions: pd.DataFrame,
    make_engine: MakeEngine | None,
    max_new_tokens: int,
    num_samples: int = 1,
    temperature: float = 0.0,
    template: templates.Template | None = None,
    max_thinking_tokens: int | None = None,
    server: ServerParams | None = None,
) -> pd.DataFrame:
    """`write_answers` of the model in the folder `writer`, which `server` may run, kept in a parquet file at `path`.

    `make_engine` is needed if the file does not hold the answers of these weights under these settings. Of several
    processes the main one writes, and the others wait. Samples and thoughts are written so many questions at a time, so
    that a run which was killed goes on behind them. Raises StageError without `make_engine`.
    """
    tokenizer, limits = loading.load_tokenizer(writer), (max_new_tokens, num_samples, template, max_thinking_tokens)
    asked = [max_new_tokens, num_samples, template and template.hash, max_thinking_tokens, params.models.dtype]
    asked += [temperature, params.seed, server and server.model] if temperature else []
    key = key_of(asked, [weights_of(writer), questions.id.tolist()], write_answers)
    if find_record(path, key) is None and PartialState().is_main_process:
        if make_engine is None:
            raise StageError(f"{path} is not there: run notebook {path.parent.name} up to it")
        torch.manual_seed(params.seed)
        model = server or loading.load_model(writer, params.models)
        settings = {"scheduler": "static", "batch_tokens": max(params.inference.batch_tokens, WRITE_TOKENS)}
        at_once = PART_QUESTIONS if num_samples > 1 or max_thinking_tokens else max(1, len(questions))
        unfinished = path.with_name(f"{path.name}.{key}.part")
        parts = [pd.read_parquet(unfinished)] if unfinished.is_file() else []
        with closing(make_engine(model, tokenizer.pad_token_id, **settings, temperature=temperature)) as engine:
            for start in range(sum(map(len, parts)) // num_samples, max(1, len(questions)), at_once):
                parts.append(write_answers(engine, tokenizer, questions.iloc[start : start + at_once], *limits))
                with atomic_path(unfinished) as scratch:
                    pd.concat(parts, ignore_index=True).to_parquet(scratch)
        with recorded(path, key):
            unfinished.replace(path)
    PartialState().wait_for_everyone()
    return pd.read_parquet(path)


def weights_of(folder: Path) -> list[str]:
    """Digests of the model's weights in a folder."""
    return [sha256_of(path) for path in sorted(folder.glob("*.safetensors"))]


def write_answers(
    engine: Engine,
    tokenizer,
    questions: pd.DataFrame,
    max_new_tokens: int,
    num_samples: int = 1,
    template: templates.Template | None = None,
    max_thinking_tokens: int | None = None,
) -> pd.DataFrame:
    """`num_samples` answers to each question: id, source, sample, thought, text, tokens of both, and if `finished`.

    Without a `template` each question is asked as in training. With `max_thinking_tokens` a model that thinks does so
    first. An answer is finished if it ends with the end token and is not empty, and its thought was not cut. Raises
    MedkitError for test questions.
    """
    if (questions.split == "test").any():
        raise MedkitError("a model must not answer test questions for training; give rows of another split")
    records, prompts = [record for record in questions.to_dict("records") for _ in range(num_samples)], []
    for record in records:
        messages = templates.render(record, template or templates.pick_template(record["kind"], "option_text"))
        prompts.append(templates.encode(tokenizer, messages, thought="" if max_thinking_tokens else None)[0])
    written = write(engine, tokenizer, prompts, max_new_tokens, max_thinking_tokens)
    table = pd.DataFrame({name: [record[name] for record in records] for name in ("id", "source")})
    return table.assign(
        sample=[number % num_samples for number in range(len(records))],
        thought=[one.thought for one in written],
        text=[one.answer.strip() for one in written],
        tokens=[one.thinking_tokens + one.answer_tokens for one in written],
        finished=[one.finished for one in written],
    )


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
    numbers = []
    for source, count in counts.items():
        numbers += islice(cycle([n for n, its_source in enumerate(sources) if its_source == source]), count)
    if not numbers:
        raise MedkitError("no rows to learn from: raise `labelled` or `transfer` in data.datasets")
    return [*numbers, *islice(cycle(numbers), sum(counts.values()) - len(numbers))]


def repeat_examples(lengths: Sequence[int], num_tokens: int) -> list[int]:
    """Numbers of examples, in turn, again and again: as many as have at most `num_tokens` tokens together, or one.

    lengths: tokens of each example, at least 1; those of the prompt count too.
    """
    count = sum(1 for _ in takewhile(lambda total: total <= num_tokens, accumulate(cycle(lengths))))
    return [*islice(cycle(range(len(lengths))), max(1, count))]


def keep_verified(
    samples: pd.DataFrame, questions: pd.DataFrame, too_easy: float = 1.0, own: pd.DataFrame | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The samples to learn, at most one of a question, and the yield per source.

    Kept is the shortest sample that is finished and right (it names the question's answer). A question is left out if
    the student's share of right samples is `too_easy` or more (above 1: none is); `own` are the student's samples, the
    teacher's count without them. The yield counts questions asked and too easy, and samples drawn, right and kept.
    """
    records = questions.set_index("id").to_dict("index")

    def is_right(table: pd.DataFrame) -> list[bool]:
        return [
            answer_parser.parse(text, list(records[id]["options"]), templates.RATIONALE) == records[id]["answer"]
            for id, text in zip(table.id, table.text, strict=True)
        ]

    samples = samples.assign(right=is_right(samples))
    pass_rates = (samples if own is None else own.assign(right=is_right(own))).groupby("id").right.mean()
    easy = samples.id.map(pass_rates) >= too_easy
    verified = samples[samples.finished & samples.right & ~easy].sort_values("tokens", kind="stable")
    verified = verified.drop_duplicates("id").sort_index()
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
    """One example per sample: the question is given; thought, reasons, answer and end token are predicted."""
    records, examples = {record["id"]: record for record in questions.to_dict("records")}, []
    for id, thought, text in verified[["id", "thought", "text"]].itertuples(index=False):
        messages = templates.render(records[id], templates.RATIONALE)
        prompt_ids, answer_ids = templates.encode(tokenizer, messages, text, thought or None)
        examples.append(Example([*prompt_ids, *answer_ids], len(prompt_ids)))
    return examples
