"""Generated text → the option that it declares, or the record that it holds: the inverse of `templates`.

A letter or an option's text is an answer only where the text *declares* it: alone at the start, after a lead ("the
answer is", "I choose"), before a verdict ("is correct") or in a box, and with an end behind it. Nothing is guessed.
"""

import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from pydantic import BaseModel

from medkit.prompts.templates import LETTERS, Template
from medkit.prompts.thinking import after_thoughts

Kind = Literal["boxed", "final", "declared", "denied", "doubted"]  # how a text names a choice


def normalise(text: str) -> str:
    """The form in which texts are compared: one case and width, single spaces, no surrounding marks."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"\s+", " ", text).strip(" \t\n.*\"'`")


def parse(text: str, options: list[str], template: Template) -> int | None:
    """Index of the option that `text` gives as its answer, or None if it does not say so plainly.

    An option's own text counts under every template, a letter only if the prompt listed letters. Thoughts do not count,
    nor what follows "if", "not" or "might". Two different declared choices, a choice that is also denied, or a letter
    beyond the options give None. A box, or else a "final answer", overrides all that was declared before it.
    """
    text = after_thoughts(text)
    whole, exact = normalise(text), [normalise(option) for option in options]
    is_letter = template.lists_options and whole.upper() in tuple(LETTERS)  # then the letter counts, not an option "A"
    if whole and exact.count(whole) == 1 and not is_letter:
        return exact.index(whole)
    plain = tuple(_plain(option).strip(" .\"'`") for option in options)
    statements = list(_Reading(_plain(text), plain, template.lists_options).statements())
    choices = {kind: {choice for choice, its_kind in statements if its_kind == kind} for kind in get_args(Kind)}
    counted = choices["boxed"] or choices["final"] or choices["declared"]
    if len(counted) != 1 or counted & (choices["denied"] if counted is choices["declared"] else {None}):
        return None
    choice = counted.pop()
    return choice if choice < len(options) else None


def parse_record(text: str, schema: type[BaseModel]) -> BaseModel | None:
    """The one JSON object in the text, alone, in a fence or between prose, checked against `schema`; else None.

    A second object, a stray brace, an array around it, a repeated or unknown key, or a wrong type gives None.
    """
    text = after_thoughts(text)
    start = text.find("{")
    if start < 0 or text[:start].rstrip().endswith("["):
        return None
    try:
        _, end = _JSON.raw_decode(text, start)
        if re.search(r"[{}]", text[:start] + text[end:]):
            return None
        return schema.model_validate_json(text[start:end], strict=True, extra="forbid")
    except (ValueError, RecursionError):  # what pydantic raises is a ValueError too
        return None


def _unique(pairs: list[tuple]) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is repeated")
    return dict(pairs)


_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=int)  # int("NaN") is an error, as it should be


def _plain(text: str) -> str:
    """Without Markdown, emoji and runs of white space; full-width letters become plain."""
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"\\(?:text|textbf|textit|mathrm|mathbf) ?\{([^{}]{0,300})\}", r"\1", text)
    text = re.sub("[\u2600-\u27bf\ufe0f\u200d\U0001f000-\U0001faff]", " ", text)
    text = re.sub(r"(?m)^ *#+ +", "", text)
    text = re.sub(r"(?<![^\W_])[*_`]+|[*_`]+(?![^\W_])", "", text)  # around words only: "HLA-B*27" keeps its star
    return re.sub(r"[^\S\n]+", " ", re.sub(r"\s*\n\s*", "\n", text)).strip()


# --- the grammar. Every repetition is bounded and white space is single, so time is linear in the text -------------

_FIT = r"(?:best|correct|right|(?:single )?most (?:likely|appropriate|accurate|suitable))"
_NOUN = r"(?:answer|option|choice|one|step|diagnosis|cause|explanation|treatment|therapy|management|drug|agent|test)"
_IS = r"(?:is|must be|should be|would be)(?: (?:clearly|definitely|therefore|thus|most likely|likely|probably))?"
_WORD = r"(?: [\w'’-]{1,20})"
_LEAD = re.compile(
    rf"\b(?:final )?answer(?: choice| option| letter)?(?: (?:to|for|here|in)\b{_WORD}{{0,6}}?)?"
    rf"(?: {_IS}:?| ?(?:[:=→–—-]|\n))"
    rf"|\b(?:final (?:choice|option)|{_FIT}{_WORD}{{0,3}}? {_NOUN}(?: (?:in|for|of|to|here|at)\b{_WORD}{{0,6}}?)?)"
    rf"(?: {_IS}:?| ?[:=])"
    r"|\b(?:receive|choose|select|pick|go with|recommend) (?:option|choice|answer)"
    r"|\b(?:I|we)(?: would| will|['’]d|['’]ll)? (?:choose|select|pick|go with)"
    r"|(?:\brespuesta(?: correcta)?|\bréponse|\bantwort|答案) ?(?:est?|ist|[是为:])",
    re.IGNORECASE,
)
_BOX = re.compile(r"\\boxed ?\{([^{}]{0,300})\}")
_NAMED = re.compile(r"\s?(?:(?:the )?(?:correct )?(?:option|choice|letter|answer) )?", re.IGNORECASE)
_CLAUSE = re.compile(
    r"(?:\A|[\n.;:,!?–—(] ?|\b(?:so|therefore|thus|hence|that|think|believe|because|but|while|only) "
    r"|(?<!or )(?<!and )\b(?=option\b))"
    r"(?:(?:the )?(?:option|choice|answer|letter) )?(?=[^\s.;:,!?])",
    re.IGNORECASE,
)
_LETTER = re.compile(r"([\"'“‘(\[$]{0,3})([A-Ja-j])(?!\w|['’+/–-]\w)([\"'”’)\]$]{0,3})")
_LABEL = re.compile(r"^[(\[]?([A-J])(?:[).:\]]+|$)", re.MULTILINE)
_OPEN, _CLOSE = re.compile(r"[\"'“‘(\[]{0,3}"), re.compile(r"[\"'”’)\]]{0,3}")
_BETWEEN = re.compile(r"[.:,)\]]{0,2} ?(?:[–—-] )?")  # a letter and its option's text
_SEVERAL = re.compile(r" ?(?:[,/+&]|(?:or|and|nor|plus|with)\b)", re.IGNORECASE)
_NEXT_WORD = re.compile(r"[.!] (\w{4,})")
_PHRASE = re.compile(r"[.!] \S+(?: \S+)?(?:\n|\Z)")  # "E. Coli infection": a capital, but no sentence
_END = re.compile(
    r" ?[.!:;。]*(?:\n|\Z)|[.!] (?=(?-i:[A-Z(]))|; |。|,? (?:because|since)\b"
    r"|, (?:as(?! well)|which|due to|given|based on|(?:and )?not|rather than|instead of)\b",
    re.IGNORECASE,
)
_RIGHT = re.compile(
    rf" {_IS} (?:the {_NOUN}|(?:the |my )?{_FIT}(?:(?: next)? {_NOUN})?)(?: here| in this case| for this patient)?"
    r"(?= ?[.!:;。]*(?:\n|\Z)|[.!;:] |,? (?:because|since)\b|, (?!but|however|though|although|only|if|unless|when|or))",
    re.IGNORECASE,
)
_WRONG = re.compile(  # "C is not a symptom" does not deny C: it may be why C is the answer
    rf" (?:isn['’]t|(?:is|would be|seems) not) (?:the )?(?:{_FIT}|answer)\b"
    r"| (?:is|would be|seems) (?:the )?(?:incorrect|wrong)\b",
    re.IGNORECASE,
)
_NOT = re.compile(r"\b(?:not|never) (?:(?:the )?(?:option|answer) )?", re.IGNORECASE)
_VERDICTS = {"yes", "no", "maybe"}
_COMMA = re.compile(r"[,;:] | [–—-] ")
_FIRST = re.compile(r"(?:\A\W{0,3}\w+\W{1,3}|[.!?\n] ?|\bbut )(?=(\w{1,9}))")
_SENTENCE_BREAK = re.compile(r"[.!?;\n]")
_CLAUSE_BREAK = re.compile(r"[,:]|\b(?:so|but|and|therefore|thus|hence|because)\b", re.IGNORECASE)
_IF = re.compile(r"\b(?:if|unless|whether)\b", re.IGNORECASE)
_DENIED = re.compile(r"\b(?:not|never|cannot|neither|nor|except|incorrect|wrong|false)\b|n['’]t\b", re.IGNORECASE)
_DOUBTED = re.compile(r"\b(?:might|may|could|tempt\w{0,5}|initially|at first)\b", re.IGNORECASE)


@dataclass(frozen=True)
class _Reading:
    """One plain text, the plain options it may name, and whether letters count in it."""

    text: str
    options: tuple[str, ...]
    letters: bool

    def statements(self) -> Iterator[tuple[int | None, Kind]]:
        """Every choice that the text names, and how; None for a box or a final answer that names no single choice."""
        for box in _BOX.finditer(self.text):
            yield replace(self, text=box[1].strip()).declared_at(0), "boxed"
        named = [(self.at_beginning(), "declared"), *self.after_leads(), *self.before_verdicts(), *self.denials()]
        yield from ((choice, kind) for choice, kind in named if choice is not None or kind == "final")

    def at_beginning(self) -> int | None:
        """The choice that the text begins with; "Yes, it does" counts if no other verdict begins a sentence."""
        start = _NAMED.match(self.text).end()
        choice, end = self.choice_at(start)
        labels = [LETTERS.index(label) for label in _LABEL.findall(self.text)] if self.letters else []
        if choice is not None and choice + 1 in labels and labels.count(choice) < 2:
            return None  # a list of the options
        verdict = "" if choice is None or choice >= len(self.options) else self.options[choice].casefold()
        if verdict in _VERDICTS and verdict in self.text[start:end].casefold():
            others = {word.casefold() for word in _FIRST.findall(self.text)} & _VERDICTS - {verdict}
            if others or _COMMA.match(self.text, end):
                return None if others else choice
        return self.declared_at(start)

    def after_leads(self) -> Iterator[tuple[int | None, Kind]]:
        for lead in _LEAD.finditer(self.text):
            choice = self.declared_at(_NAMED.match(self.text, lead.end()).end())
            kind = "final" if "final" in lead[0].casefold() else "declared"
            yield choice, self.doubt(lead.start(), lead[0]) or kind

    def before_verdicts(self) -> Iterator[tuple[int, Kind]]:
        has_verdict = _RIGHT.search(self.text) or _WRONG.search(self.text)
        for clause in _CLAUSE.finditer(self.text) if has_verdict else ():
            choice, end = self.choice_at(clause.end(), prose=True)
            if choice is not None and _WRONG.match(self.text, end):
                yield choice, "denied"
            elif choice is not None and _RIGHT.match(self.text, end):
                yield choice, self.doubt(clause.end()) or "declared"

    def denials(self) -> Iterator[tuple[int, Kind]]:
        for denial in _NOT.finditer(self.text):
            choice, _ = self.choice_at(denial.end(), prose=True)
            if choice is not None and not self.option_at(denial.start())[0]:  # "not pure" may be an option
                yield choice, "denied"

    def doubt(self, start: int, lead: str = "") -> Literal["", "doubted", "denied"]:
        """Whether the `lead`, or words before `start` in the same sentence, take the statement back."""
        sentence = _SENTENCE_BREAK.split(self.text[max(0, start - 200) : start])[-1]
        clause = _CLAUSE_BREAK.split(sentence)[-1] + lead
        if _IF.search(sentence + lead) or _DOUBTED.search(clause):
            return "doubted"
        return "denied" if _DENIED.search(clause) else ""

    def declared_at(self, start: int) -> int | None:
        """The one choice whose letter or text is at `start` with an end behind it."""
        choice, end = self.choice_at(start)
        stop = _END.match(self.text, end)
        if choice is None or stop is None:
            return None
        named, last = self.option_at(stop.end())
        if named and choice not in named and _END.match(self.text, last):
            return None  # one option after another
        label = _LABEL.match(self.text, stop.end()) if self.letters and stop[0].endswith("\n") else None
        if label:
            alone = self.text[label.end() : label.end() + 1] in ("", "\n")
            following = LETTERS.index(label[1]) - choice
            return None if following == 1 or (following and alone) else choice
        return choice

    def choice_at(self, start: int, prose: bool = False) -> tuple[int | None, int]:
        """The choice whose letter or text is at `start`, and where it ends; the longer reading counts."""
        named, text_end = self.option_at(start)
        if self.letters:  # an option that is itself a letter is named by its place
            named = {i for i in named if self.options[i].upper() not in tuple(LETTERS)}
        choice, end = self.letter_at(start, prose) if self.letters else (None, start)
        if named and text_end >= end:
            one = named if choice is None or text_end > end else named | {choice}
            return (min(one) if len(one) == 1 else None), text_end
        return choice, end

    def letter_at(self, start: int, prose: bool) -> tuple[int | None, int]:
        """The choice of a letter at `start`, and where it ends; none if the words after it name another option."""
        given = _LETTER.match(self.text, start)
        if given is None:
            return None, start
        choice, end = LETTERS.index(given[2].upper()), given.end()
        marked = given[1] or given[3] or self.text[end : end + 1] in (".", ")")
        word = given[2].islower() and not marked  # "the answer is a" may go on, a label may not
        if word and (prose or (given[2] in "ai" and self.text[max(0, start - 2) : max(0, start - 1)].isalnum())):
            return None, start
        between = _BETWEEN.match(self.text, end).end()
        named, text_end = self.option_at(between)
        if named:
            if choice not in named:
                return None, start
            closed = any(pattern.match(self.text, text_end) for pattern in (_END, _RIGHT, _WRONG))
            several = _SEVERAL.match(self.text, text_end) and not closed
            return (None, start) if several else (choice, text_end if closed else end)
        others = [option.casefold() for i, option in enumerate(self.options) if i != choice]
        text = self.options[choice].casefold() if choice < len(self.options) else ""
        line = self.text[between : between + len(text)].partition("\n")[0]
        short = normalise(line)  # "C. Metformin" for "Metformin 500 mg"
        if short and text.startswith(f"{short} ") and not any(option.startswith(short) for option in others):
            return choice, between + len(line)
        word = _NEXT_WORD.match(self.text, end)
        if _PHRASE.match(self.text, end) or (word and any(word[1].casefold() in option for option in others)):
            return None, start
        return choice, end

    def option_at(self, start: int) -> tuple[set[int], int]:
        """The options (mostly one) with the longest text at `start`, and where it ends."""
        ends = {}
        for begin in {start, _OPEN.match(self.text, start).end()}:
            first = self.text[begin : begin + 1].casefold()
            for i, option in enumerate(self.options):
                if first and option[:1].casefold() == first:
                    end = begin + len(option)
                    cut = option[-1].isalnum() and self.text[end : end + 1].isalnum()
                    if not cut and self.text[begin:end].casefold() == option.casefold():
                        ends[i] = max(end, ends.get(i, 0))
        longest = max(ends.values(), default=start)
        return {i for i, end in ends.items() if end == longest}, _CLOSE.match(self.text, longest).end()
