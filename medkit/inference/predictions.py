"""The test questions, and a model's answers to them. Nothing is judged here: `evaluation` does."""

import os
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
from torch import nn

from medkit.inference.torch_engine import TorchEngine
from medkit.modeling.batches import letter_forms
from medkit.modeling.engine import WRITE_TOKENS, write
from medkit.modeling.option_scoring import Item, score_options
from medkit.modeling.train_once import find_record, key_of, recorded
from medkit.params import Params
from medkit.prompts import templates
from medkit.stage import FINGERPRINT, STAGES, MedkitError, Stage, atomic_path


def choose_questions(questions: pd.DataFrame, counts: dict[str, dict[str, int | str]], seed: int) -> pd.DataFrame:
    """Test questions with a column `scoring`; `counts` maps scoring → source → number of questions, or "all".

    Every variant gets the same questions. A smaller number takes the first of what a larger one takes. Raises
    MedkitError if a source has fewer test questions.
    """
    test = questions[questions.split == "test"].sample(frac=1, random_state=seed)
    chosen = []
    for scoring, sources in counts.items():
        for source, count in sources.items():
            rows = test[test.source == source]
            if count != "all" and count > len(rows):
                raise MedkitError(
                    f"inference: {count} questions of {source} by {scoring} are asked for, the test split has "
                    f"{len(rows)}; ask for fewer, or raise data.datasets.{source}.test"
                )
            chosen.append((rows if count == "all" else rows.head(count)).assign(scoring=scoring))
    return pd.concat(chosen, ignore_index=True)


def predict(
    model: nn.Module,
    tokenizer,
    asked: pd.DataFrame,
    batch_tokens: int,
    max_new_tokens: int,
    max_thinking_tokens: int | None = None,
) -> pd.DataFrame:
    """Raw answers to `asked`: log-probability (nats) and length in tokens of each option, or generated text and length.

    Columns id, scoring, template, logprobs, answer_tokens, thinking_tokens, text; a row for each row of `asked`, in its
    order. Log-probabilities stand in the question's own order of options. A model that thinks does so before a
    generated answer, for at most `max_thinking_tokens` tokens; then `text` begins with its thought, in its marks.
    Otherwise its thought is empty, as it is before options and records, whose answers are learned without one. A row
    may bring its `template` (a name) and `order` (option `order[p]` is shown at place p).
    """
    rows, scored, generated = [], [], ([], [])  # generated without and with a thought
    for question in asked.to_dict("records"):
        # a cell that is NaN was not given; other floats are values
        question = {name: v for name, v in question.items() if not (isinstance(v, float) and np.isnan(v))}
        is_generated = question["scoring"] == "generated"
        thinks = bool(max_thinking_tokens) and is_generated and question["kind"] not in templates.FORMS
        template, prompt, answers = _encode(tokenizer, question, thinks)
        row = {"id": question["id"], "scoring": question["scoring"], "template": template.name}
        row |= {"logprobs": [], "answer_tokens": [len(forms[0]) for forms in answers]}
        rows.append(row | {"thinking_tokens": 0, "text": ""})
        if is_generated:
            generated[thinks].append((rows[-1], prompt))
        else:
            scored.append((rows[-1], prompt, answers))
    items = [Item(prompt, [ids for forms in answers for ids in forms]) for _, prompt, answers in scored]
    for (row, _, answers), scores in zip(scored, score_options(model, items), strict=True):
        of_forms = iter(scores)  # the probability of an option is the sum over all of its forms
        row["logprobs"] = [float(np.logaddexp.reduce([next(of_forms) for _ in forms])) for forms in answers]
    thinking, size = templates.thinking_of(tokenizer), max(batch_tokens, WRITE_TOKENS)
    engine = TorchEngine(model, tokenizer.pad_token_id, scheduler="static", batch_tokens=size)
    for budget, asked_rows in zip((None, max_thinking_tokens), generated, strict=True):
        prompts = [prompt for _, prompt in asked_rows]
        written = write(engine, tokenizer, prompts, max_new_tokens, budget) if prompts else []
        for (row, _), one in zip(asked_rows, written, strict=True):
            text = f"{thinking.opening}{one.thought}{thinking.closing}{one.answer}" if budget else one.answer
            row |= {"text": text, "answer_tokens": [one.answer_tokens], "thinking_tokens": one.thinking_tokens}
    return pd.DataFrame(rows)


def answers_once(
    stage: Stage, variant: str, params: Params, ask: Callable[[], dict[str, pd.DataFrame]]
) -> dict[str, pd.DataFrame]:
    """The tables that `ask` returns for a variant, by name; what a killed notebook had asked is read back.

    They stand in the stage's folder `checkpoints`. The key is of the params, of all files of the earlier stages, and of
    the notebook, which the runner gives. Without a runner nothing is read back: a person may have edited the cells.
    """
    inputs = [Stage(stage.run, name).manifest().get("sha256") for name in STAGES if name < stage.name]
    fingerprint = os.environ.get(FINGERPRINT)
    key = key_of(params.model_dump(mode="json"), [*inputs, fingerprint], predict)
    folder = stage.path(f"checkpoints/{variant}")
    began, facts = time.monotonic(), find_record(folder, key) if fingerprint else None
    if facts is not None:
        stage.started -= facts.get("duration_s", 0.0)  # so the manifest counts what is read back
    else:
        tables = ask()
        with recorded(folder, key, duration_s=time.monotonic() - began), atomic_path(folder) as scratch:
            scratch.mkdir()
            for name, table in tables.items():
                table.to_parquet(scratch / f"{name}.parquet", index=False)
    return {path.stem: pd.read_parquet(path) for path in folder.glob("*.parquet")}


def _encode(tokenizer, question: dict, thinks: bool) -> tuple[templates.Template, list[int], list[list[list[int]]]]:
    """How a row is asked: template, prompt, and the forms of each answer to be scored, in the question's own order."""
    scoring, order = question["scoring"], list(question.get("order", range(len(question["options"]))))
    template = templates.pick_template(question["kind"], scoring)
    template = templates.TEMPLATES[question.get("template", template.name)]
    shown = {**question, "options": [question["options"][i] for i in order]}
    messages = templates.render(shown, template)
    prompt, _ = templates.encode(tokenizer, messages, thought="" if thinks else None)
    if scoring == "generated":
        if order != sorted(order):
            raise MedkitError(f"{question['id']}: a generated answer is read in the options' own order; give no other")
        return template, prompt, []
    if scoring == "letter" and not template.lists_options:
        raise MedkitError(f"{question['id']}: the template {template.name!r} shows no letters; ask for option_text")
    if scoring == "letter":
        answers = [letter_forms(tokenizer, letter) for letter in templates.answers(shown, template)]
    else:
        answers = [[templates.encode(tokenizer, messages, text)[1]] for text in shown["options"]]
    return template, prompt, [forms for _, forms in sorted(zip(order, answers, strict=True))]
