"""Question → messages and token ids: a named, hashed template per way of asking.

Pure text, no torch. A template renders a question row (see `data.COLUMNS`) to chat messages and names the text of each
choice; `parsing` reads a generated answer back. Scoring and training both use `encode`, so prefix and answer are
tokenised in one way only.
"""

from __future__ import annotations

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
