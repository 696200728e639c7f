"""Question → chat messages and token ids: a registry of named, hashed templates, one for each way of asking.

Scoring and training both use `encode`, so prompt and answer are tokenised in one way only.
"""

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import lru_cache
from typing import Literal

from pydantic import BaseModel, ConfigDict

from medkit.params import digest
from medkit.prompts.thinking import Thinking, find_thinking
from medkit.stage import MedkitError, reading

LETTERS = "ABCDEFGHIJ"
PINNED_DATE = date(2025, 1, 1)
SYSTEM = "Answer briefly."  # without a system turn, some chat templates add a longer one of their own


class Record(BaseModel):
    """What the first hospital writes down after a consultation; null for what was not said."""

    model_config = ConfigDict(extra="forbid", strict=True)

    age: int | None
    sex: Literal["female", "male"] | None
    complaint: str | None
    duration: str | None  # "3 weeks"
    drug: str | None  # that the patient takes now
    dose: str | None  # "20 mg"
    allergy: str | None
    denies: str | None  # a symptom that is not there


class RecordB(BaseModel):
    """The second hospital's form: abbreviations, other units, and the drug that was stopped."""

    model_config = ConfigDict(extra="forbid", strict=True)

    band: str | None  # age by decade: "50-59"
    sx: Literal["f", "m"] | None
    cc: str | None  # chief complaint
    days: int | None
    rx: str | None
    g: float | None  # dose in grams
    alg: str | None
    stop: str | None  # the drug that was stopped


FORMS: dict[str, type[BaseModel]] = {"record": Record, "record_b": RecordB}
"""The form of each kind of question (`data.COLUMNS`) whose answer is a record: one JSON object, in this order."""
INSTRUCTION = "instruction"  # the kind of question whose answer is free text, and whose context is a chat in JSON
WRITTEN = (*FORMS, INSTRUCTION)  # kinds whose answer is a text, no choice of an option


@dataclass(frozen=True)
class Template:
    """How one kind of prompt is written."""

    name: str
    instruction: str
    lists_options: bool = False  # the prompt shows the options; then the answer is a letter, else an option's text

    @property
    def hash(self) -> str:
        """Changes with any word of the prompt; part of the key of cached log-probabilities."""
        return digest([asdict(self), SYSTEM])


TEXT = Template("text", "")
LETTER = Template("letter", "Answer with the letter of the correct option.", lists_options=True)
RATIONALE = Template(
    "rationale",
    "Reason in at most three sentences. Then write “Answer:” and the letter of the correct option.",
    lists_options=True,
)
ABSTRACT = Template("abstract", "Answer yes, no or maybe.")
RECORD = Template("record", "Write the patient's record as JSON.")
RECORD_B = Template("record_b", "Fill in form B as JSON.")

# As in the paper (arXiv 2505.00025): one base and one suffix per problem type. It prints neither; these are ours.
OPEN_BASE = "Answer the question of a patient in plain words. Say what is not known."
OPEN_SUFFIXES = {
    "medication": "Name what the drug is for, how it is taken, and what must not be taken with it. Give no dose that "
    "depends on age, weight or kidneys without saying so.",
    "diagnosis": "Name the likely causes, most common first, and the finding that would tell them apart.",
    "treatment": "Name the usual treatment, its alternatives, and when it is better not to treat.",
    "prevention": "Name what lowers the risk, and by how much where that is known.",
    "emergency": "Begin with what to do now and whom to call. Explain only after that.",
    "other": "",
}
OPEN = {problem: Template(problem, f"{OPEN_BASE} {suffix}".strip()) for problem, suffix in OPEN_SUFFIXES.items()}
TEMPLATES = {t.name: t for t in (TEXT, LETTER, RATIONALE, ABSTRACT, RECORD, RECORD_B, *OPEN.values())}


def pick_template(kind: str, scoring: str) -> Template:
    """The template for a kind of question (`data.COLUMNS`) under a scoring method (`params.Scoring`)."""
    if kind in FORMS:
        return TEMPLATES[kind]
    if scoring == "letter":
        return LETTER
    return ABSTRACT if kind == "abstract" else TEXT


def render(question: dict, template: Template, shots: Sequence[dict] = ()) -> list[dict]:
    """Chat messages for one question row, ending with the user's turn.

    `shots` are solved question rows (`answer` ≥ 0) that come first, each as two turns, in the order given: put the most
    similar one last, next to the question. An instruction comes after its own chat, whose system turn counts.
    """
    if question.get("kind") == INSTRUCTION:
        chat = json.loads(question["context"] or "[]")
        system = [] if chat and chat[0]["role"] == "system" else [{"role": "system", "content": SYSTEM}]
        return [*system, *chat, {"role": "user", "content": _ask(question | {"context": ""}, template)}]
    turns = [{"role": "system", "content": SYSTEM}]
    for shot in shots:
        turns.append({"role": "user", "content": _ask(shot, template)})
        turns.append({"role": "assistant", "content": answers(shot, template)[shot["answer"]]})
    return [*turns, {"role": "user", "content": _ask(question, template)}]


def _ask(question: dict, template: Template) -> str:
    parts = [question["context"], question["question"]]
    if template.lists_options:
        parts.append("\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, question["options"], strict=False)))
    return "\n\n".join(part for part in (*parts, template.instruction) if part)


def answers(question: dict, template: Template) -> list[str]:
    """The answer text for each option of the question."""
    options = list(question["options"])
    return list(LETTERS[: len(options)]) if template.lists_options else options


BASE_TURNS = (
    "{% for turn in messages %}{% if turn['role'] == 'user' %}Question: {{ turn['content'] }}\nAnswer:"
    "{% elif turn['role'] == 'assistant' %} {{ turn['content'] }}\n\n{% endif %}{% endfor %}"
)


def chat_template(tokenizer) -> str:
    """The tokenizer's chat template; of several named ones, the one named "default"; of a base model, BASE_TURNS.

    A date of today in it becomes PINNED_DATE, with a warning: prompts must not differ by day. Raises MedkitError if no
    template is the default, or if it asks for the date in a way that cannot be pinned.
    """
    template = tokenizer.chat_template
    if not template:
        starts = tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]
        return (tokenizer.bos_token if starts else "") + BASE_TURNS
    if isinstance(template, dict):
        if "default" not in template:
            raise MedkitError(f"chat templates {sorted(template)}: none is named 'default'; keep one, under that name")
        template = template["default"]
    if re.search(r"strftime_now\s*\(", template):
        literal = r"strftime_now\s*\(\s*(['\"])(.*?)\1\s*\)"
        template = re.sub(literal, lambda call: repr(PINNED_DATE.strftime(call[2])), template)
        if re.search(r"strftime_now\s*\(", template):
            raise MedkitError("the chat template computes the date with strftime_now; write a fixed date into it")
        warnings.warn(f"the chat template writes today's date: {PINNED_DATE} is written instead", stacklevel=2)
    return template


def end_ids(tokenizer) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's end token, then those of the model's generation config."""
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *getattr(tokenizer, "end_token_ids", ())]))


def thinking_of(tokenizer) -> Thinking:
    """How the model of this tokenizer thinks."""
    with reading("the chat template", MedkitError, "correct it in the tokenizer"):
        return find_thinking(tokenizer, chat_template(tokenizer))


def file_template(tokenizer) -> str:
    """The chat template for a model file that other programs read: it renders what `encode` reads.

    A chat without a system turn gets that of training, SYSTEM; where the model's own template refuses a system turn,
    its text begins the first user turn. A thought is empty and closed.
    """
    template = thinking_of(tokenizer).closed_template
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "?"}]
    first = f"[{{'role': 'system', 'content': {json.dumps(SYSTEM)}}}]"
    add = f"{{% if messages[0]['role'] != 'system' %}}{{% set messages = {first} + messages %}}{{% endif %}}"
    try:
        tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    except Exception:  # a template is a program: it can raise anything
        text = "messages[0]['content'] + '\\n\\n' + messages[1]['content']"
        add += f"{{% set messages = [{{'role': 'user', 'content': {text}}}] + messages[2:] %}}"
    return add + template


def encode(
    tokenizer, messages: list[dict], answer: str | None = None, thought: str | None = None
) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and of the answer with its end token (an empty list without an answer).

    Uses the model's chat template; a base model without one gets "Question: … Answer: …" turns. Prompt and answer are
    tokenised separately, so the border between given and predicted tokens is exact. A control token within a message or
    an answer is read as text.

    The prompt of a model that thinks ends in an empty thought, closed. With a `thought` it ends in an open one, which
    the model goes on writing (""), or which is predicted before the answer. Other models write it as plain text.
    """
    thinking = thinking_of(tokenizer)
    prompt_ids = _apply(tokenizer, thinking.closed_template if thought is None else thinking.open_template, messages)
    if answer is None:
        return prompt_ids, []
    thought_ids = []
    if thought:
        thought_ids = _text_ids(tokenizer, thinking, thought)
        thought_ids += tokenizer(thinking.closing or "\n\n", add_special_tokens=False).input_ids
    answer_ids = _text_ids(tokenizer, thinking, answer if tokenizer.chat_template else f" {answer}")
    return prompt_ids, [*thought_ids, *answer_ids, tokenizer.eos_token_id]


def _text_ids(tokenizer, thinking: Thinking, text: str) -> list[int]:
    """Token ids of an answer or a thought. Marks such as R1's `</think>`, which is no special token, are text too."""
    marks = _plain_marks(tokenizer, thinking.open_template)
    if not any(mark in text for mark in marks):
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    echo = f"{{% set marks = {json.dumps(marks, ensure_ascii=False)} %}}{{{{ messages[0]['content'] }}}}"
    options = {"sanitize_control_tokens": True, "return_dict": False}
    return tokenizer.apply_chat_template([{"role": "assistant", "content": text}], chat_template=echo, **options)


@lru_cache(maxsize=8)
def _plain_marks(tokenizer, template: str) -> tuple[str, ...]:
    """The added tokens of a chat template that are not special, and so are found in any text."""
    tokens = tokenizer.added_tokens_decoder.values()
    return tuple(t.content for t in tokens if not t.special and not t.content.isspace() and t.content in template)


def count_prompt_tokens(tokenizers: Sequence, question: dict) -> int:
    """Tokens of a question's prompt that asks for an option's text, by the tokenizer that needs most.

    The response of an instruction counts too, for it can be as long as it likes.
    """
    messages = render(question, pick_template(question["kind"], "option_text"))
    # without a response `answer` is −1, the place of None
    response = [*question["options"], None][question["answer"]] if question["kind"] == INSTRUCTION else None
    return max(sum(map(len, encode(tokenizer, messages, response))) for tokenizer in tokenizers)


def _apply(tokenizer, template: str, messages: list[dict]) -> list[int]:
    """Token ids of the messages; where the template refuses a system turn, its text begins the first user turn."""
    options = {"add_generation_prompt": True, "sanitize_control_tokens": True, "return_dict": False}
    try:
        return tokenizer.apply_chat_template(messages, chat_template=template, **options)
    except Exception as error:  # a template is a program: it can raise anything
        if messages[0]["role"] == "system":
            system, first, *rest = messages
            first = first | {"content": f"{system['content']}\n\n{first['content']}"}
            return _apply(tokenizer, template, [first, *rest])
        raise MedkitError(f"the chat template refuses these turns ({error}); correct it in the tokenizer") from error
