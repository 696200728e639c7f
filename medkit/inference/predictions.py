"""Answers to the test questions: which are asked, how each is put, and what a model says to them.

Log-probabilities and token ids come from `torch_engine`. Reading an answer's text is for `parsing`, judging it for
`evaluation`, timing for `workloads`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from torch import nn

from medkit.inference.torch_engine import TorchEngine
from medkit.modeling.batches import letter_forms
from medkit.modeling.engine import Request
from medkit.modeling.option_scoring import Item
from medkit.prompts import templates


def choose_questions(
    questions: pd.DataFrame,
    wanted: dict[str, dict[str, int | str]],
    seed: int,
    key: str = "inference.questions.{scoring}",
) -> pd.DataFrame:
    """Test questions with a column `scoring`: for each method and source the number asked for, alike for all variants.

    A smaller number takes the first of what a larger one takes. `key` names the params that the numbers come from.
    Raises ValueError if a source has fewer test questions than asked for.
    """
    test = questions[questions.split == "test"].sample(frac=1, random_state=seed)
    chosen = []
    for scoring, sources in wanted.items():
        for source, count in sources.items():
            rows = test[test.source == source]
            if count != "all" and count > len(rows):
                raise ValueError(
                    f"{key.format(scoring=scoring)}.{source} is {count}, the test split has {len(rows)}; "
                    f"lower it, or raise data.datasets.{source}.test"
                )
            chosen.append((rows if count == "all" else rows.head(count)).assign(scoring=scoring))
    return pd.concat(chosen, ignore_index=True)


def predict(
    model: nn.Module, tokenizer, asked: pd.DataFrame, batch_tokens: int, max_new_tokens: int, said: dict | None = None
) -> pd.DataFrame:
    """Raw answers to `asked`: option log-probabilities with answer lengths in tokens, or generated text and its length.

    Columns id, scoring, template, logprobs, answer_tokens, text, and study and condition where `asked` has them (empty
    for the plain way). Nothing is judged here. Log-probabilities stand in the question's own order of options.

    A row may also bring its `template` (a name), `shots` (solved question rows) and `order` (option `order[p]` is shown
    at place p). Rows with the same prompt share one reading of it, so ask everything of a model in one call, or give
    its calls the same `said`: it keeps what this model said within these limits, and nothing is asked of it twice.
    """
    said = {} if said is None else said  # (prompt, answer) → log-probability, and prompt → text and length in tokens
    labels = [name for name in ("study", "condition") if name in asked]
    rows, scored = [], []
    reads: dict[tuple, dict[tuple, None]] = {}  # prompt → its answers to be scored, in order and each once
    writes: dict[tuple, list[dict]] = {}  # prompt → the rows that want its continuation
    for question in asked.to_dict("records"):
        question = {name: value for name, value in question.items() if not isinstance(value, float)}  # NaN: not given
        template, prompt, answers = _encode(tokenizer, question)
        row = {"id": question["id"], "scoring": question["scoring"], "template": template.name}
        row |= {"logprobs": [], "answer_tokens": [len(forms[0]) for forms in answers], "text": ""}
        rows.append(row | {name: question.get(name, "") for name in labels})
        if question["scoring"] == "generated":
            writes.setdefault(prompt, []).append(rows[-1])
        else:
            scored.append((rows[-1], prompt, answers))
            for ids in (ids for forms in answers for ids in forms if (prompt, ids) not in said):
                reads.setdefault(prompt, {})[ids] = None
    items = [Item(list(prompt), [list(ids) for ids in answers]) for prompt, answers in reads.items()]
    engine = _engine(model, tokenizer, batch_tokens)
    for (prompt, answers), found in zip(reads.items(), engine.score(items), strict=True):
        said |= {(prompt, ids): logprob for ids, logprob in zip(answers, found, strict=True)}
    for row, prompt, answers in scored:  # an option is as likely as all of its forms together
        row["logprobs"] = [float(np.logaddexp.reduce([said[prompt, ids] for ids in forms])) for forms in answers]
    new = [prompt for prompt in writes if prompt not in said]
    said |= zip(new, _write(engine, tokenizer, new, max_new_tokens), strict=True)
    for prompt, answered in writes.items():
        text, length = said[prompt]
        for row in answered:
            row |= {"text": text, "answer_tokens": [length]}
    return pd.DataFrame(rows)


def write_answers(
    model: nn.Module, tokenizer, conversations: Iterable[list[dict]], batch_tokens: int, max_new_tokens: int
) -> list[str]:
    """The model's greedy answers to chat messages, in their order: for questions without options."""
    asked = [templates.encode(tokenizer, messages)[0] for messages in conversations]
    engine = _engine(model, tokenizer, batch_tokens)
    return [text for text, _ in _write(engine, tokenizer, asked, max_new_tokens)]


def _engine(model: nn.Module, tokenizer, batch_tokens: int) -> TorchEngine:
    """Everything asked is there at once, so padded batches do best."""
    return TorchEngine(model, tokenizer.pad_token_id, scheduler="static", batch_tokens=batch_tokens)


def _write(
    engine: TorchEngine, tokenizer, asked: Sequence[Sequence[int]], max_new_tokens: int
) -> list[tuple[str, int]]:
    """Text and length in tokens (end token included) of the greedy answer to each prompt."""
    said = engine.generate([Request(prompt, max_new_tokens, (tokenizer.eos_token_id,)) for prompt in asked])
    return [(tokenizer.decode(s.token_ids, skip_special_tokens=True), len(s.token_ids)) for s in said]


def _encode(tokenizer, question: dict) -> tuple[templates.Template, tuple[int, ...], list[list[tuple[int, ...]]]]:
    """How a row is asked: template, prompt, and the forms of each answer to be scored, in the question's own order."""
    scoring, order = question["scoring"], list(question.get("order", range(len(question["options"]))))
    template = templates.pick_template(question["kind"], scoring)
    template = templates.TEMPLATES[question.get("template", template.name)]
    shown = {**question, "options": [question["options"][i] for i in order]}
    messages = templates.render(shown, template, question.get("shots", ()))
    prompt = tuple(templates.encode(tokenizer, messages)[0])
    if scoring == "generated":
        if order != sorted(order):
            raise ValueError(f"{question['id']}: a generated answer is read in the options' own order; give no other")
        return template, prompt, []
    if scoring == "letter" and not template.lists_options:
        raise ValueError(f"{question['id']}: the template {template.name!r} shows no letters; ask for option_text")
    texts = templates.answers(shown, template) if scoring == "letter" else shown["options"]
    if scoring == "letter" and not template.lead:
        answers = [letter_forms(tokenizer, letter) for letter in texts]
    else:
        answers = [[templates.encode(tokenizer, messages, text)[1]] for text in texts]
        if scoring == "letter":  # it is judged by its own token; that it ends there says nothing about which letter
            answers = [[ids[:-1]] for (ids,) in answers]
    in_order = [forms for _, forms in sorted(zip(order, answers, strict=True))]
    return template, prompt, [[tuple(ids) for ids in forms] for forms in in_order]
