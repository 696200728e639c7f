"""Chat → token ids under the template of its problem type; tokens → text while they come.

The template is `prompts`' own, so that what is served is what was measured. No network, no engine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from medkit import prompts
from medkit.problems import classify_by_keywords

_OPTIONS = re.compile(r"^\s*A[.):]\s.*^\s*B[.):]\s", re.MULTILINE | re.DOTALL)
BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character, or not one yet


def pick_template(question: str) -> prompts.Template:
    """Letters where the question lists its options, else the template of its problem type (by keywords)."""
    return prompts.LETTER if _OPTIONS.search(question) else prompts.OPEN[classify_by_keywords(question)]


def apply_template(turns: Sequence[dict]) -> tuple[list[dict], str | None]:
    """The chat with its last question rendered under a template, and the template's name.

    A chat that brings a system message of its own stays as it is (None).
    """
    if any(turn["role"] == "system" for turn in turns):
        return list(turns), None
    template = pick_template(turns[-1]["content"])
    system, question = prompts.render({"context": "", "question": turns[-1]["content"], "options": []}, template)
    return [system, *turns[:-1], question], template.name


def token_names(tokenizer, as_ids: bool) -> Callable[[int], str]:
    """How tokens are called where a key must be text: by their own text, or as vLLM's `token_id:<id>`."""
    return "token_id:{}".format if as_ids else lambda token: tokenizer.decode([token])


class TextStream:
    """Text of an answer, piece by piece; the pieces together are the tokenizer's own decoding of all tokens.

    A token is often part of a character, and some decoders drop a leading space. So the tokens of the last piece are
    decoded along, and a piece comes when it ends in a whole character. Text that may become a stop string is held back.
    (Byte fallback takes characters back when a broken byte follows them; what has been sent stays.)
    """

    def __init__(self, tokenizer, stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, stops
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._last: list[int] = []  # tokens of the piece before
        self._last_text = ""
        self._new: list[int] = []  # tokens whose text has not come yet
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False
        """Whether a stop string came; the text ends before it."""

    def push(self, token_id: int) -> str:
        """The text that is certain with this token; often empty."""
        if token_id in self._special:
            return ""
        self._new.append(token_id)
        text = self._decode(self._last + self._new)
        if text.endswith(BROKEN) or len(text) <= len(self._last_text):
            return ""
        piece = text[len(self._last_text) :]
        self._last, self._new = self._new, []
        self._last_text = self._decode(self._last)
        return self._hold(piece)

    def flush(self) -> str:
        """What is left when no token follows: broken characters, and the beginning of a stop that never came."""
        text = self._decode(self._last + self._new) if self._new else self._last_text
        piece = self._hold(text[len(self._last_text) :])
        self._new = []
        rest, self._held = self._held, ""
        return piece + rest

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _hold(self, piece: str) -> str:
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        longest = max(map(len, self._stops), default=1) - 1
        starts = range(max(0, len(text) - longest), len(text))
        keep = next((at for at in starts if any(stop.startswith(text[at:]) for stop in self._stops)), len(text))
        self._held = text[keep:]
        return text[:keep]
