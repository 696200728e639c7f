"""How models think before they answer: the marks around a thought, and what a chat template does about it."""

import json
import re
from dataclasses import dataclass
from functools import lru_cache

# how a thought opens and closes, and the text that closes it where the pattern allows several; a chat template may have
# opened it in the prompt
THOUGHTS = (
    *((f"<{name}>", f"</{name}>") for name in ("think", "thinking", "thought", "reasoning")),
    (r"\[THINK\]", r"\[/THINK\]"),  # Magistral
    (
        r"(?m:^)(?:#+ ?|\*\*)Thinking\b",
        r"(?m:^)(?:#+ ?|\*\*)Final Response\b[:*]*",
        "## Final Response",
    ),  # HuatuoGPT-o1
    (r"<\|channel\|>(?:analysis|commentary)\b", r"<\|channel\|>final<\|message\|>"),  # gpt-oss
    (r"\Aanalysis(?=\w)", "assistantfinal"),  # the same, where the tokenizer left its special tokens out
    ("<unused94>(?:thought)?", "<unused95>"),  # MedGemma
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),  # OpenThinker
)
_PAIRS = "|".join(
    f"(?P<open{i}>{opening})|(?P<close{i}>{closing})" for i, (opening, closing, *_) in enumerate(THOUGHTS)
)
_MARK = re.compile(rf"{_PAIRS}|<answer>|<\|begin_of_solution\|>", re.IGNORECASE)
_SAID = re.compile(
    r"</answer>|<\|(?:eot_id|eom_id|im_end|end|return|endoftext|end_of_text|end_of_solution)\|>"
    "|<end_of_turn>|</s>|<eos>|<｜end▁of▁sentence｜>"
)


def after_thoughts(text: str) -> str:
    """What stands behind the last closed thought, up to a thought that is not closed or the end of the turn."""
    opened: dict[str, int] = {}  # family → where its thought began
    start = 0
    for mark in _MARK.finditer(text):
        kind, family = re.fullmatch(r"(open|close|)(\d*)", mark.lastgroup or "").groups()
        if kind == "open":
            opened.setdefault(family, mark.start())
        else:  # a thought ends, and with it those that it began within itself
            its_start = opened.get(family, len(text))
            opened = {name: began for name, began in opened.items() if began < its_start}
            start = mark.end()
    return _SAID.split(text[start : min(opened.values(), default=len(text))], maxsplit=1)[0].strip()


@dataclass(frozen=True)
class Thinking:
    """How a model thinks, as its chat template tells; without marks it does not think.

    The template ends a prompt in an opened thought, or it can (`enable_thinking`) end it in an empty one, and leaves it
    to the model to open its thought.
    """

    open_template: str  # the chat template whose prompt ends in an opened thought
    closed_template: str  # the one whose prompt ends in an empty thought, closed in the way of the model family
    opening: str = ""  # what begins a thought, with the white space of the family
    closing: str = ""  # what ends it


@lru_cache(maxsize=8)
def find_thinking(tokenizer, template: str) -> Thinking:
    """How the model of this chat template thinks."""
    has_switch = "enable_thinking" in template
    if has_switch or _MARK.search(template):
        on, off = (f"{{% set enable_thinking = {v} %}}{template}" * has_switch or template for v in ("true", "false"))
        turns, options = [{"role": "user", "content": "?"}], {"tokenize": False, "add_generation_prompt": True}
        prompt, closed = (tokenizer.apply_chat_template(turns, chat_template=t, **options) for t in (on, off))
        for opens, closes, *text in THOUGHTS:
            opened = re.search(rf"{opens}\s*\Z", prompt)
            empty = re.search(rf"({opens}\n?)(\s*{closes}\s*)\Z", closed)
            if opened:
                [closing_text] = text or [re.sub(r"\\(.)", r"\1", closes)]
                closing = empty[2] if empty else f"\n{closing_text}\n\n"
                return Thinking(on, off if empty else on + _literal(closing), opened[0], closing)
            if empty and has_switch:
                return Thinking(on + _literal(empty[1]), off, empty[1], empty[2])
    return Thinking(template, template)


def _literal(text: str) -> str:
    return f"{{{{ {json.dumps(text)} }}}}"
