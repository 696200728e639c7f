"""Question → messages and token ids, and generated text → an answer."""

from medkit.prompts.answer_parser import parse
from medkit.prompts.templates import (
    FORMS,
    INSTRUCTION,
    LETTER,
    LETTERS,
    TEXT,
    WRITTEN,
    answers,
    count_prompt_tokens,
    encode,
    pick_template,
    render,
)
