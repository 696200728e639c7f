"""Generated answer text → choice or None, the other half of every template in `prompts`.

Pure text. What cannot be read strictly stays None: no fuzzy guess, no first letter found in a sentence.
"""

from __future__ import annotations

import re
import unicodedata

from medkit.prompts import LETTERS, Template


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
