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


# A letter counts only where the text *declares* it, and only where it cannot be a word ("the answer is a matter of …"):
# in brackets or stars, before a mark, or before the end of the line or of the statement.
_LETTER = r"(?:[(\[*]+([A-Ja-j])[)\]*]+|([A-Ja-j])[).:\]]|([A-Ja-j])(?=[ \t]*(?:[,;*–—-]|$|\n|because\b|since\b)))"
_DECLARED = [
    re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*([A-Ja-j])\s*\}"),
    re.compile(rf"(?i:\banswer\s*(?:is|:|\*+:|:\*+)\s*(?:option\s+)?){_LETTER}"),
    re.compile(rf"(?i:\b(?:best|correct|right) (?:next step|step|option|choice|answer) is\s+(?:option\s+)?){_LETTER}"),
    re.compile(rf"(?i:\b(?:receive|choose|select|pick) option\s+){_LETTER}"),
]
_NEGATED = re.compile(r"\b(?:not|never|except)\s+(?:option\s+)?[(\[]?[A-J](?![A-Za-z'])")
_BARE = re.compile(r"^[(\[*]*(?P<letter>[A-Ja-j])[)\]*]*[.:)]?(?:\s+(?P<text>.+))?$", re.DOTALL)


def parse(text: str, options: list[str], template: Template) -> int | None:
    """Index of the option that `text` gives as its answer, or None when it does not say so plainly.

    An option's own text counts under both templates, a letter only where the prompt listed letters. Text inside
    `<think>` is not an answer. Two different declared letters, a negated letter or a letter beyond the options: None.
    """
    text = re.sub(r"<think>.*?(</think>|\Z)", "", text, flags=re.DOTALL)
    plain = [normalise(option) for option in options]
    said = normalise(
        re.sub(r"^\W*(?:the )?(?:answer|final answer)\s*(?:is|:|\*\*:|:\*\*)\s*", "", text.strip(), flags=re.IGNORECASE)
    )
    if plain.count(said) == 1:
        return plain.index(said)
    if not template.lists_options:
        return None
    bare = _BARE.match(text.strip())
    if bare and (bare["text"] is None or normalise(bare["text"]) in plain):
        found = {bare["letter"].upper()}
        if bare["text"] is not None and LETTERS.index(bare["letter"].upper()) != plain.index(normalise(bare["text"])):
            return None  # the letter says one thing and the words another
    elif _NEGATED.search(text):
        return None
    else:
        matches = [match for pattern in _DECLARED for match in pattern.finditer(text)]
        found = {next(letter for letter in match.groups() if letter).upper() for match in matches}
    if len(found) != 1:
        return None
    choice = LETTERS.index(found.pop())
    return choice if choice < len(options) else None
