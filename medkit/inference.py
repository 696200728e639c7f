"""Answers to the test questions, three ways to schedule requests, and their timing.

Every timed call says how long prompts and answers were, how many ran together and what was warmed up. Answers are
token ids; reading them is for `prompts`, judging them for `evaluation`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from medkit import prompts
from medkit.batching import bucket_by_length, letter_forms
from medkit.scoring import Item, score_options

NEVER = -1  # an end token no model emits: generation then runs to its full length
PAGE_SIZE = 64  # tokens per page of the paged key-value cache
WRITING = 4  # times as many tokens at once as when scoring: a row that writes needs logits at one position only


# --- answering the test questions ------------------------------------------------------------------------------------


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


def prompt_of(tokenizer, question: dict) -> list[int]:
    """Token ids of the prompt that asks for an option's text."""
    template = prompts.pick_template(question["kind"], "option_text")
    return prompts.encode(tokenizer, prompts.render(question, template))[0]


def predict(model: nn.Module, tokenizer, asked: pd.DataFrame, batch_tokens: int, max_new_tokens: int) -> pd.DataFrame:
    """Raw answers to `asked`: option log-probabilities with answer lengths in tokens, or generated text and its length.

    Columns id, scoring, template, logprobs, answer_tokens, text, and study and condition where `asked` has them (empty
    for the plain way). Nothing is judged here. Log-probabilities stand in the question's own order of options.

    A row may also bring its `template` (a name), `shots` (solved question rows) and `order` (option `order[p]` is shown
    at place p). Rows with the same prompt share one reading of it, so ask everything of a model in one call.
    """
    labels = [name for name in ("study", "condition") if name in asked]
    rows, scored = [], []
    reads: dict[tuple, dict[tuple, int]] = {}  # prompt → its answers to be scored, numbered
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
            numbers = reads.setdefault(prompt, {})
            found = [[numbers.setdefault(ids, len(numbers)) for ids in forms] for forms in answers]
            scored.append((rows[-1], prompt, found))
    items = [Item(list(prompt), [list(ids) for ids in answers]) for prompt, answers in reads.items()]
    scores = dict(zip(reads, score_options(model, items, batch_tokens, tokenizer.pad_token_id), strict=True))
    for row, prompt, found in scored:  # an option is as likely as all of its forms together
        row["logprobs"] = [float(np.logaddexp.reduce([scores[prompt][n] for n in forms])) for forms in found]
    written = _write(model, tokenizer, list(writes), batch_tokens, max_new_tokens)
    for answered, (text, length) in zip(writes.values(), written, strict=True):
        for row in answered:
            row |= {"text": text, "answer_tokens": [length]}
    return pd.DataFrame(rows)


def write_answers(
    model: nn.Module, tokenizer, conversations: Iterable[list[dict]], batch_tokens: int, max_new_tokens: int
) -> list[str]:
    """The model's greedy answers to chat messages, in their order: for questions without options."""
    asked = [prompts.encode(tokenizer, messages)[0] for messages in conversations]
    return [text for text, _ in _write(model, tokenizer, asked, batch_tokens, max_new_tokens)]


def _write(
    model: nn.Module, tokenizer, asked: Sequence[Sequence[int]], batch_tokens: int, max_new_tokens: int
) -> list[tuple[str, int]]:
    """Text and length in tokens (end token included) of the greedy answer to each prompt."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    written: list[tuple[str, int]] = [("", 0)] * len(asked)
    lengths = [len(prompt) + max_new_tokens for prompt in asked]
    for numbers in bucket_by_length(lengths, WRITING * batch_tokens):
        batch = [list(asked[i]) for i in numbers]
        said = generate_static(model, batch, [max_new_tokens] * len(batch), eos, pad)
        for number, answer in zip(numbers, said, strict=True):
            text = tokenizer.decode(answer.token_ids, skip_special_tokens=True)
            written[number] = (text, len(answer.token_ids))
    return written


def _encode(tokenizer, question: dict) -> tuple[prompts.Template, tuple[int, ...], list[list[tuple[int, ...]]]]:
    """How a row is asked: template, prompt, and the forms of each answer to be scored, in the question's own order."""
    scoring, order = question["scoring"], list(question.get("order", range(len(question["options"]))))
    template = prompts.pick_template(question["kind"], scoring)
    template = prompts.TEMPLATES[question.get("template", template.name)]
    shown = {**question, "options": [question["options"][i] for i in order]}
    messages = prompts.render(shown, template, question.get("shots", ()))
    if scoring == "generated":
        if order != sorted(order):
            raise ValueError(f"{question['id']}: a generated answer is read in the options' own order; give no other")
        return template, tuple(prompts.encode(tokenizer, messages)[0]), []
    if scoring == "letter" and not template.lists_options:
        raise ValueError(f"{question['id']}: the template {template.name!r} shows no letters; ask for option_text")
    texts = prompts.answers(shown, template) if scoring == "letter" else shown["options"]
    pairs = dict(zip(order, (prompts.encode(tokenizer, messages, text) for text in texts), strict=True))
    # a letter is judged by its own token; that it ends there says nothing about which letter it is
    answers = [[tuple(ids[:-1] if scoring == "letter" else ids)] for _, (_, ids) in sorted(pairs.items())]
    if scoring == "letter" and not template.lead:
        forms = dict(zip(order, (letter_forms(tokenizer, letter) for letter in texts), strict=True))
        answers = [list(map(tuple, found)) for _, found in sorted(forms.items())]
    return template, tuple(pairs[0][0]), answers


# --- generation ----------------------------------------------------------------------------------------------------


@dataclass
class Generation:
    """One request's answer and, relative to the start of its workload, when each token came (seconds)."""

    token_ids: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)


def generate_sequential(
    model: nn.Module, prompts: list[list[int]], lengths: list[int], eos: int, pad: int
) -> list[Generation]:
    """Greedy, one request after the other."""
    return [
        _generate(model, [p], n, [n], eos, pad, time.perf_counter())[0] for p, n in zip(prompts, lengths, strict=True)
    ]


def generate_static(
    model: nn.Module, prompts: list[list[int]], lengths: list[int], eos: int, pad: int
) -> list[Generation]:
    """Greedy, all requests in one padded batch that runs until the longest is done."""
    return _generate(model, prompts, max(lengths), lengths, eos, pad, time.perf_counter())


def generate_continuous(
    model: nn.Module, prompts: list[list[int]], lengths: list[int], eos: int, pad: int
) -> list[Generation]:
    """Greedy, requests join and leave the running batch (transformers' paged continuous batching).

    On a CPU the cache is sized here: the library's own default takes most of the memory.
    """
    blocks = sum(-(-(len(p) + n) // PAGE_SIZE) for p, n in zip(prompts, lengths, strict=True)) + 8
    config = ContinuousBatchingConfig(
        page_size=PAGE_SIZE, num_blocks=blocks, max_batch_tokens=512, max_requests_per_batch=len(prompts)
    )
    generation = GenerationConfig(do_sample=False, eos_token_id=eos, pad_token_id=pad, max_new_tokens=max(lengths))
    found: dict[str, Generation] = {}
    began = time.perf_counter()
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=config, timeout=5
    ) as manager:
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            manager.add_request(
                prompt, request_id=str(number), max_new_tokens=length, record_timestamps=True, eos_token_id=eos
            )
        while len(found) < len(prompts):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError(f"continuous batching stopped after {len(found)} of {len(prompts)} requests")
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(f"continuous batching failed on request {result.request_id}: {result.error}")
                found[result.request_id] = Generation(
                    list(result.generated_tokens), [t - began for t in result.timestamps]
                )
    return [found[str(number)] for number in range(len(prompts))]


SCHEDULERS = {"sequential": generate_sequential, "static": generate_static, "continuous": generate_continuous}


class _Clock(StoppingCriteria):
    """Notes the time after every decoding step; never stops anything."""

    def __init__(self, began: float):
        self.began, self.times_s = began, []

    def __call__(self, input_ids, scores, **kwargs):
        self.times_s.append(time.perf_counter() - self.began)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def _generate(
    model: nn.Module, prompts: list[list[int]], steps: int, lengths: list[int], eos: int, pad: int, began: float
) -> list[Generation]:
    length = max(map(len, prompts))
    input_ids = torch.full((len(prompts), length), pad)
    attention_mask = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        input_ids[row, length - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, length - len(prompt) :] = 1
    clock = _Clock(began)
    config = GenerationConfig(do_sample=False, max_new_tokens=steps, eos_token_id=eos, pad_token_id=pad)
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([clock]),
    )[:, length:].tolist()
    return [_until(Generation(row, clock.times_s), n, eos) for row, n in zip(output, lengths, strict=True)]


def _until(generation: Generation, length: int, eos: int) -> Generation:
    """The first `length` tokens, up to and with the end token: what the request asked for."""
    tokens = generation.token_ids[:length]
    if eos in tokens:
        tokens = tokens[: tokens.index(eos) + 1]
    return Generation(tokens, generation.token_times_s[: len(tokens)])


# --- timing --------------------------------------------------------------------------------------------------------


def measure(scheduler: str, model: nn.Module, prompts: list[list[int]], lengths: list[int], pad: int) -> dict:
    """One timed pass of a workload at exactly the asked output lengths.

    ttft_s and latency_s_per_token are medians over the requests; a request's latency per token is its time from the
    first to the last token over the steps between. throughput counts generated tokens over the whole pass.
    """
    began = time.perf_counter()
    generations = SCHEDULERS[scheduler](model, prompts, lengths, NEVER, pad)
    duration_s = time.perf_counter() - began
    written = [len(g.token_ids) for g in generations]
    if written != lengths:
        raise RuntimeError(f"{scheduler}: asked for {lengths} tokens, got {written}; timings would not compare")
    decode = torch.tensor([(g.token_times_s[-1] - g.token_times_s[0]) / (len(g.token_ids) - 1) for g in generations])
    return {
        "scheduler": scheduler,
        "requests": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "output_tokens": sum(lengths),
        "ttft_s": torch.tensor([g.token_times_s[0] for g in generations]).median().item(),
        "latency_s_per_token": decode.median().item(),
        "duration_s": duration_s,
        "throughput_tokens_per_s": sum(lengths) / duration_s,
    }
