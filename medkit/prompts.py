"""Question → messages, and answer text → choice or None: a tested pair per template.

Pure text, no torch. A template renders a question row (see `data.COLUMNS`) to chat messages and names the text of each
choice; `parse` reads a generated answer back. What cannot be read strictly stays None: no fuzzy guess, no first letter
found in a sentence. Scoring and training both use `encode`, so prefix and answer are tokenised in one way only.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from medkit.params import digest

LETTERS = "ABCDEFGHIJ"
SYSTEM = "Answer briefly."  # without one, some chat templates put in a longer one of their own


@dataclass(frozen=True)
class Template:
    """How one kind of prompt is written and what a full answer to it looks like."""

    name: str
    lists_options: bool
    """Whether the prompt shows the options; then the answer is a letter, else the option's own text."""
    instruction: str

    @property
    def hash(self) -> str:
        """Changes with any word of the prompt; recorded with cached signals and predictions."""
        return digest([self.name, self.lists_options, self.instruction, SYSTEM])


TEXT = Template("text", lists_options=False, instruction="")
LETTER = Template("letter", lists_options=True, instruction="Answer with the letter of the correct option.")
ABSTRACT = Template("abstract", lists_options=False, instruction="Answer yes, no or maybe.")
TEMPLATES = {template.name: template for template in (TEXT, LETTER, ABSTRACT)}


def pick_template(kind: str, scoring: str) -> Template:
    """The template for a kind of question (`data.COLUMNS`) under a scoring method (`params.Scoring`)."""
    if scoring == "letter":
        return LETTER
    return ABSTRACT if kind == "abstract" else TEXT


def render(question: dict, template: Template) -> list[dict]:
    """Chat messages for one question row; the assistant's turn comes next."""
    parts = [question["context"], question["question"]]
    if template.lists_options:
        parts.append("\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, question["options"], strict=False)))
    parts.append(template.instruction)
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "\n\n".join(p for p in parts if p)}]


def answers(question: dict, template: Template) -> list[str]:
    """The answer text that stands for each option of the question."""
    options = list(question["options"])
    return list(LETTERS[: len(options)]) if template.lists_options else options


def encode(tokenizer, messages: list[dict], answer: str | None = None) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the answer with its end token (no answer: an empty list).

    Uses the model's chat template; a base model without one gets "Question: … Answer:". Prompt and answer are
    tokenised apart, so the border between what is given and what is predicted is exact.
    """
    if tokenizer.chat_template:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    else:
        prompt = f"Question: {messages[-1]['content']}\nAnswer:"
        prompt_ids = tokenizer(prompt).input_ids
        answer = None if answer is None else f" {answer}"
    if answer is None:
        return prompt_ids, []
    return prompt_ids, [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]


def normalise(text: str) -> str:
    """Case, width, surrounding marks and runs of white space removed: the form in which texts are compared."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"\s+", " ", text).strip(" \t\n.*\"'`")


# A letter counts only where the text *declares* it. What follows the letter must not make it a word or one of several
# ("the answer is a matter of …", "D-dimer", "E. coli", "A or B"): nothing, its option's text, a reason, a new sentence.
_BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*([A-Ja-j])\s*\}")
_LEAD = re.compile(
    r"\banswer\s*(?:is|:\*+|\*+:|:)\s*(?:option\s+)?"
    r"|\b(?:best|correct|right) (?:next step|step|option|choice|answer) is\s+(?:option\s+)?"
    r"|\b(?:receive|choose|select|pick) option\s+",
    re.IGNORECASE,
)
_GIVEN = re.compile(r"[(\[*]*([A-Ja-j])(?![\w'’])(?P<marks>[)\]*.:]*)(?P<rest>.*)")
_REASON = re.compile(r"\s*,?\s+(?:because|since)\b", re.IGNORECASE)
_DENIED = re.compile(
    r"\b(?:not|never|except)\s+(?:option\s+)?[(\[]?[A-J](?![A-Za-z'])"
    r"|(?i:\b(?:not|never)|n['’]t)\s+(?:\w+\s+)?(?:receive|choose|select|pick)\b"
    r"|(?i:\b(?:incorrect|wrong)\s+(?:answer|option|choice))\b"
)
_BARE = re.compile(r"[(\[*]*([A-Ja-j])[)\]*]*[.:)]?(?:\s+(?P<text>.+))?", re.DOTALL)


def parse(text: str, options: list[str], template: Template) -> int | None:
    """Index of the option that `text` gives as its answer, or None when it does not say so plainly.

    An option's own text counts under every template, a letter only where the prompt listed letters. What stands before
    `</think>` is no answer. Two different declared letters, a denied letter or a letter beyond the options: None.
    """
    text = re.sub(r"(?s)^.*</think>|<think>.*\Z", "", text).strip()
    plain = [normalise(option) for option in options]
    bare = _BARE.fullmatch(text) if template.lists_options else None
    if bare:
        choice, words = LETTERS.index(bare[1].upper()), normalise(bare["text"] or "")
        if bare["text"] is None:
            return choice if choice < len(options) else None
        if words and words in plain:  # the letter may say one thing and the words another
            return choice if choice < len(options) and plain[choice] == words else None
    lead = r"^\W*(?:the )?(?:final )?answer\s*(?:is|:|\*\*:|:\*\*)\s*"
    for said in (normalise(text), normalise(re.sub(lead, "", text, flags=re.IGNORECASE))):
        # after "Answer:" a letter that was listed is that letter, also where another option reads the same
        letter = template.lists_options and len(said) == 1 and said.upper() in LETTERS[: len(options)]
        if said and plain.count(said) == 1 and not letter:
            return plain.index(said)
    if not template.lists_options or _DENIED.search(text):
        return None
    found = {_declared(text[lead.end() :], plain) for lead in _LEAD.finditer(text)} - {None}
    found |= {LETTERS.index(boxed[1].upper()) for boxed in _BOXED.finditer(text)}
    choice = found.pop() if len(found) == 1 else len(options)
    return choice if choice < len(options) else None


def _declared(text: str, plain: list[str]) -> int | None:
    """The choice whose letter `text` starts with, if it is a letter and the only one; `plain`: options, normalised."""
    given = _GIVEN.match(text)
    if given is None or (choice := LETTERS.index(given[1].upper())) >= len(plain):
        return None
    rest, words = given["rest"], normalise(given["rest"])
    own = bool(plain[choice]) and words.startswith(plain[choice])
    other = any(option and words.startswith(option) for i, option in enumerate(plain) if i != choice)
    sentence = "." in given["marks"] and re.match(r"\s+[A-Z]", rest)
    return choice if own or not (words or other) or (not other and (_REASON.match(rest) or sentence)) else None
