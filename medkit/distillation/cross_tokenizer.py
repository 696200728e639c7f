"""Distillation between two tokenizers: spans of bytes, with the chain rule inside a span.

Two tokenizations of one answer are cut where both have a border. In such a span the student writes its text with m
tokens and the teacher with n, so by the chain rule both say how likely they are to write it; and, since only the last
token of a span is open, how likely they are to end it in another way. Two ways are the same event iff they write the
same bytes: display strings ("Ġ", "▁", "<0x0A>") are never compared. What the teacher's k kept tokens have in common
with the student's vocabulary is compared event by event, the rest of the probability as one bucket: a KL divergence
over one partition for both. With one tokenizer every span is one token, and this is `losses.sparse_kl`.

A probability here is that of one path of tokens. Other paths write the same bytes (a student that knows "scurvy" gives
"sc" little, the teacher that writes "sc" + "urvy" much): that is compared too, and is habit, not knowledge.
There is no temperature: a bucket of paths is not made of tokens that could be tempered. The bridge that needs no
alignment at all is `options`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from transformers.convert_slow_tokenizer import bytes_to_unicode

from medkit.distillation.losses import FLOOR
from medkit.distillation.shards import SignalsError
from medkit.modeling.batches import Example, Predicted

if TYPE_CHECKING:
    from medkit.distillation.teacher_cache import Signals

END = b"\xff<end>"  # stands for the end token; the byte 0xff is in no UTF-8 text


class AlignmentError(SignalsError):
    """Two tokenizations that cannot be compared; the message names the text or token and the cure."""


# --- bytes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """What every token of a tokenizer writes."""

    pieces: list[bytes | None]
    """Per token id; `END` for the end token, None for other tokens that write nothing."""
    ids: dict[bytes, int]
    """The token that writes these bytes: a piece of its own before a byte-fallback token for the same byte."""

    def spell(self, token_ids: Sequence[int]) -> list[bytes]:
        """The bytes of each token. Raises AlignmentError for one that writes none."""
        pieces = [self.pieces[token] for token in token_ids]
        if None in pieces:
            raise AlignmentError(f"token {token_ids[pieces.index(None)]} writes no text; leave such rows out")
        return pieces


def read_vocabulary(tokenizer) -> Vocabulary:
    """The bytes of a fast tokenizer's tokens: byte-level BPE, or "▁" pieces with or without byte fallback.

    Raises AlignmentError for another kind, e.g. WordPiece, whose tokens do not say where spaces were.
    """
    decoder = json.loads(tokenizer.backend_tokenizer.decoder.__getstate__() or "null") or {}
    steps = {step["type"] for step in decoder.get("decoders", [decoder] if decoder else [])}
    replaces = "Replace" in steps or "Metaspace" in steps
    byte_of = {character: bytes([byte]) for byte, character in bytes_to_unicode().items()}
    if "ByteLevel" not in steps and not replaces:
        raise AlignmentError(f"decoder {sorted(steps)}: only byte-level and SentencePiece-like tokenizers have bytes")
    names = {number: name for name, number in tokenizer.get_vocab().items()}
    added = {number: token.special for number, token in tokenizer.added_tokens_decoder.items()}
    pieces: list[bytes | None] = [None] * (max(names) + 1)
    fallback = []
    for number, name in names.items():
        if number == tokenizer.eos_token_id:
            pieces[number] = END
        elif added.get(number):
            pass  # special: it says something about the text and is not in it
        elif "ByteLevel" in steps and number not in added:
            pieces[number] = b"".join(byte_of[character] for character in name)
        elif "ByteFallback" in steps and re.fullmatch(r"<0x[0-9A-F]{2}>", name):
            pieces[number] = bytes([int(name[3:5], 16)])
            fallback.append(number)
        else:
            pieces[number] = (name.replace("▁", " ") if replaces else name).encode()
    ids: dict[bytes, int] = {}
    for number in [*sorted(names.keys() - set(fallback)), *fallback]:
        if pieces[number]:
            ids.setdefault(pieces[number], number)
    return Vocabulary(pieces, ids)


# --- spans -----------------------------------------------------------------------------------------------------------


class Span(NamedTuple):
    """Places in two lists of tokens that write the same bytes, with no common border inside."""

    student: range
    teacher: range


def align(student: Sequence[bytes], teacher: Sequence[bytes]) -> list[Span]:
    """Spans that tile both tokenizations of one text, in order, cut at every byte where both have a border.

    One of them may begin with more spaces ("Answer: yes" against a turn of chat that is "yes"): they belong to its
    first span. Raises AlignmentError if the texts differ otherwise.
    """
    texts = b"".join(student), b"".join(teacher)
    if texts[0].lstrip(b" ") != texts[1].lstrip(b" ") or bool(student) != bool(teacher):
        raise AlignmentError(
            f"the student reads {texts[0]!r:.80}, the teacher {texts[1]!r:.80}: both must read one text; normalise it "
            f"(NFC, no special tokens in it) before it is tokenised"
        )
    places = []
    for pieces, text in zip((student, teacher), texts, strict=True):
        end, ends = min(map(len, texts)) - len(text), {}
        for place, piece in enumerate(pieces):
            end += len(piece)
            ends[end] = place + 1
        places.append(ends)
    spans, begun = [], (0, 0)
    for cut in sorted(places[0].keys() & places[1].keys()):  # one of them has no border before the text begins
        ended = places[0][cut], places[1][cut]
        spans.append(Span(range(begun[0], ended[0]), range(begun[1], ended[1])))
        begun = ended
    return spans


class Bridge:
    """Carries what a teacher said, in its tokens, over to a student with another tokenizer."""

    def __init__(self, student: Vocabulary, teacher: Vocabulary):
        self.student, self.teacher = student, teacher
        shared = torch.full((len(teacher.pieces) + 1,), -1)  # ids beyond the vocabulary are padding: the last row
        for piece, token in teacher.ids.items():
            shared[token] = student.ids.get(piece, -1)
        self.shared = shared
        """Per teacher token the student's token of the same bytes, or −1."""

    def align(self, student_ids: Sequence[int], teacher_ids: Sequence[int]) -> list[Span]:
        """Spans of an answer as each of the two tokenised it."""
        return align(self.student.spell(student_ids), self.teacher.spell(teacher_ids))

    def carry(
        self,
        student_ids: Sequence[int],
        teacher_ids: Sequence[int],
        top_ids: torch.Tensor,
        top_logprobs: torch.Tensor,
        target_logprobs: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """One answer's signals, given per teacher token (n, k) and (n,), as the student needs them, per span.

        span_lengths (S,): student tokens of each span. span_ids (S, k): the student's last token in a span that ends
        it with the bytes of the teacher's kept token, −1 where there is none. span_logprobs (S, k): how likely the
        teacher was to write the span that way, −inf where the student cannot.
        """
        written, heard = self.student.spell(student_ids), self.teacher.spell(teacher_ids)
        spans = align(written, heard)
        last = torch.tensor([span.teacher[-1] for span in spans], dtype=torch.long)
        first = torch.tensor([span.teacher[0] for span in spans], dtype=torch.long)
        so_far = nn.functional.pad(target_logprobs.double().cumsum(0), (1, 0))
        ids = self.shared[top_ids[last].clamp(max=len(self.shared) - 1)]
        more = len(b"".join(heard)) - len(b"".join(written))  # spaces in front that one side alone has
        for row, span in enumerate(spans):
            front = more if row == 0 else 0
            if len(span.student) > 1 or len(span.teacher) > 1 or front:
                path = b"".join(heard[place] for place in span.teacher[:-1])
                own = b"".join(written[place] for place in span.student[:-1])
                found = [self._continue(own, path, token, front) for token in top_ids[span.teacher[-1]].tolist()]
                ids[row] = torch.tensor(found)
        logprobs = top_logprobs[last] + (so_far[last] - so_far[first]).to(top_logprobs.dtype)[:, None]
        lengths = torch.tensor([len(span.student) for span in spans], dtype=torch.long)
        return {"span_lengths": lengths, "span_ids": ids, "span_logprobs": logprobs.masked_fill(ids < 0, -torch.inf)}

    def _continue(self, own: bytes, path: bytes, token: int, front: int) -> int:
        """The student's token that makes `own` the text of the teacher's `path` and `token`, or −1.

        `front`: how many more spaces the teacher's text begins with; negative if it is the student's.
        """
        piece = self.teacher.pieces[token] if token < len(self.teacher.pieces) else None
        if not piece or self.teacher.ids[piece] != token:
            return -1
        text = b" " * max(-front, 0) + path + piece
        before = b" " * max(front, 0) + own
        return self.student.ids.get(text[len(before) :], -1) if text.startswith(before) else -1


def span_sizes(bridge: Bridge, student: Sequence[Example], teacher: Sequence[Example]) -> list[tuple[int, int, int]]:
    """Of every span in the answers its tokens to the student, to the teacher, and its bytes.

    `student` and `teacher` are the same questions in the same order. The end of an answer, a span of no bytes, is left
    out.
    """
    sizes = []
    for ours, theirs in zip(student, teacher, strict=True):
        answers = ours.input_ids[ours.loss_start :], theirs.input_ids[theirs.loss_start :]
        written = bridge.student.spell(answers[0])
        for span in bridge.align(*answers):
            text = b"".join(written[place] for place in span.student)
            if text != END:
                sizes.append((len(span.student), len(span.teacher), len(text)))
    return sizes


class AlignedSignals:
    """A teacher's signal cache, read as extras for a student with another tokenizer (`Bridge.carry`)."""

    def __init__(self, signals: Signals, student: Sequence[Example], teacher: Sequence[Example], bridge: Bridge):
        """`student` and `teacher` are the same questions in the same order, the teacher's as they were captured.

        Raises AlignmentError, before any training, for the first answer that the two read differently.
        """
        self.signals, self.bridge = signals, bridge
        self.answers = [
            (s.input_ids[s.loss_start :], t.input_ids[t.loss_start :]) for s, t in zip(student, teacher, strict=True)
        ]
        for answers in self.answers:
            bridge.align(*answers)

    def batch(self, numbers: list[int]) -> dict[str, torch.Tensor]:
        """Extras of a batch for `SpanLoss`: spans in the order of its labelled positions."""
        carried = []
        for number in numbers:
            said = self.signals.example(number)
            given = (said["teacher_ids"], said["teacher_logprobs"], said["teacher_target_logprobs"])
            carried.append(self.bridge.carry(*self.answers[number], *given))
        return {name: torch.cat([one[name] for one in carried]) for name in carried[0]}


# --- losses ----------------------------------------------------------------------------------------------------------


def chain(logprobs: torch.Tensor, targets: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Log-probability (S, V) of writing a span's earlier tokens as they stand and then token v.

    logprobs (N, V), targets (N,); lengths (S,): tokens of each span, which sum to N. At the span's own last token it
    is the probability of its text. These are the "bayesian" merged probabilities of TRL's GOLD trainer.
    """
    last = lengths.cumsum(0) - 1
    span = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    earlier = logprobs.gather(-1, targets[:, None]).squeeze(-1).index_fill(0, last, 0.0)
    path = torch.zeros_like(logprobs[last, 0]).index_add(0, span, earlier)
    return path[:, None] + logprobs[last]


def span_kl(
    logits: torch.Tensor,
    targets: torch.Tensor,
    span_lengths: torch.Tensor,
    span_ids: torch.Tensor,
    span_logprobs: torch.Tensor,
) -> torch.Tensor:
    """KL(teacher ‖ student) per span in nats, shape (S,), over the events both can write and one bucket for the rest.

    logits (N, V) and targets (N,) of the student; the others as `Bridge.carry` gives them. It is 0 iff the teacher's
    probabilities of these events equal the student's. With one tokenizer it is never above the dense KL; with two it is
    no bound of the KL over texts, since each model is asked for one path of tokens only.
    """
    missing = span_ids < 0
    events = chain(logits.log_softmax(-1), targets, span_lengths).gather(-1, span_ids.clamp(min=0))
    p, q = _with_rest(span_logprobs), _with_rest(events.masked_fill(missing, -torch.inf))
    difference = (p - q).masked_fill(nn.functional.pad(missing, (0, 1)), 0.0)  # what is impossible for both
    return (p.exp() * difference).sum(-1)


def _with_rest(events: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (S, k) with one more column for all that they leave; rounding can leave less than nothing."""
    rest = (1 - events.exp().sum(-1, keepdim=True)).clamp(min=0) + FLOOR
    return torch.cat([events, rest.log()], -1).log_softmax(-1)


@dataclass(frozen=True)
class SpanLoss:
    """λ1·CE + λ2·KL over spans: learns from a teacher with another tokenizer through `AlignedSignals`."""

    ce_weight: float
    kl_weight: float

    def __call__(self, predicted: Predicted, extras: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        ce = nn.functional.cross_entropy(predicted.logits, predicted.targets, reduction="sum")
        signals = (extras["span_lengths"], extras["span_ids"], extras["span_logprobs"])
        kl = span_kl(predicted.logits, predicted.targets, *signals).sum()
        return self.ce_weight * ce + self.kl_weight * kl, {"ce": ce.detach(), "span_kl": kl.detach()}
