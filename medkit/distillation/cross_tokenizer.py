"""Distillation between two tokenizers: the answer is cut into spans of bytes, and spans are compared.

A span ends wherever both tokenizations have a border. By the chain rule each model gives it a probability, and the
teacher's k cached tokens at its last place are k ways to end it. A teacher's token and a student's token are the same
event if they write the same bytes. Events that both models can write are compared one by one, and the rest of the
probability as one bucket: a KL divergence over one partition. With one tokenizer it is `losses.sparse_divergence`.

A probability here is that of one path of tokens, and other paths can write the same bytes. There is no temperature,
because a bucket of paths is not a set of tokens.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import nn
from transformers.convert_slow_tokenizer import bytes_to_unicode

from medkit.distillation.losses import with_rest
from medkit.distillation.teacher_cache import TeacherCache
from medkit.modeling.batches import Example, Predicted
from medkit.stage import MedkitError

END = b"\xff<end>"  # stands for the end token; the byte 0xff is in no UTF-8 text


@dataclass(frozen=True)
class Vocabulary:
    """The bytes of every token of a tokenizer."""

    pieces: list[bytes | None]  # By token id; `END` for the end token, None for other tokens that write nothing
    ids: dict[bytes, int]
    """The token that writes these bytes; an ordinary token comes before a byte-fallback token for the same byte."""

    def to_bytes(self, token_ids: Sequence[int]) -> list[bytes]:
        """The bytes of each token. Raises MedkitError for a token that writes none."""
        pieces = [self.pieces[token] for token in token_ids]
        if None in pieces:
            raise MedkitError(
                f"token {token_ids[pieces.index(None)]} of an answer writes no text, so two tokenizers cannot be "
                f"aligned there; remove such rows from the data"
            )
        return pieces


def read_vocabulary(tokenizer) -> Vocabulary:
    """The bytes of a fast tokenizer's tokens: byte-level BPE, or "▁" pieces with or without byte fallback.

    Raises MedkitError for another kind, e.g. WordPiece, whose tokens do not tell where spaces were.
    """
    decoder = json.loads(tokenizer.backend_tokenizer.decoder.__getstate__() or "null") or {}
    steps = {step["type"] for step in decoder.get("decoders", [decoder] if decoder else [])}
    replaces = "Replace" in steps or "Metaspace" in steps
    byte_of = {character: bytes([byte]) for byte, character in bytes_to_unicode().items()}
    if "ByteLevel" not in steps and not replaces:
        raise MedkitError(
            f"distillation.alignment 'spans' needs byte-level or SentencePiece-like tokenizers, not one with decoder "
            f"{sorted(steps)}; choose models with such tokenizers"
        )
    names = {token: name for name, token in tokenizer.get_vocab().items()}
    added = {token: content.special for token, content in tokenizer.added_tokens_decoder.items()}
    pieces: list[bytes | None] = [None] * (max(names) + 1)
    fallback = []
    for token, name in names.items():
        if token == tokenizer.eos_token_id:
            pieces[token] = END
        elif added.get(token):
            pass  # a special token is not part of the text
        elif "ByteLevel" in steps and token not in added:
            pieces[token] = b"".join(byte_of[character] for character in name)
        elif "ByteFallback" in steps and re.fullmatch(r"<0x[0-9A-F]{2}>", name):
            pieces[token] = bytes([int(name[3:5], 16)])
            fallback.append(token)
        else:
            pieces[token] = (name.replace("▁", " ") if replaces else name).encode()
    ids: dict[bytes, int] = {}
    for token in [*sorted(names.keys() - set(fallback)), *fallback]:
        if pieces[token]:
            ids.setdefault(pieces[token], token)
    return Vocabulary(pieces, ids)


class Span(NamedTuple):
    """Positions in two lists of tokens that write the same bytes, with no common border inside."""

    student: range
    teacher: range


def align(student: Sequence[bytes], teacher: Sequence[bytes]) -> list[Span]:
    """Spans that cover both tokenizations of one text, in order, cut wherever both have a border.

    One of the texts may begin with more spaces ("Answer: yes" against a chat turn "yes"): they belong to its first
    span. Raises MedkitError if the texts differ in another way.
    """
    texts = b"".join(student), b"".join(teacher)
    if texts[0].lstrip(b" ") != texts[1].lstrip(b" ") or bool(student) != bool(teacher):
        raise MedkitError(
            f"the student's tokens write {texts[0]!r:.80}, the teacher's {texts[1]!r:.80}, but both must write one "
            f"text; normalise the data (NFC, no special tokens in the text)"
        )
    borders = []
    for pieces, text in zip((student, teacher), texts, strict=True):
        offset, tokens_before = min(map(len, texts)) - len(text), {}
        for position, piece in enumerate(pieces):
            offset += len(piece)
            tokens_before[offset] = position + 1
        borders.append(tokens_before)
    spans, start = [], (0, 0)
    for offset in sorted(borders[0].keys() & borders[1].keys()):
        end = borders[0][offset], borders[1][offset]
        spans.append(Span(range(start[0], end[0]), range(start[1], end[1])))
        start = end
    return spans


class TokenAligner:
    """Maps a teacher's cached log-probabilities to the tokens of a student with another tokenizer."""

    def __init__(self, student: Vocabulary, teacher: Vocabulary):
        self.student, self.teacher = student, teacher
        self.shared = torch.full((len(teacher.pieces) + 1,), -1)  # the last row: padding ids beyond the vocabulary
        """By teacher token the student's token of the same bytes, or −1."""
        for piece, token in teacher.ids.items():
            self.shared[token] = student.ids.get(piece, -1)

    @classmethod
    def from_tokenizers(cls, student, teacher) -> Self:
        """Raises MedkitError if the bytes of a tokenizer's tokens are not known."""
        return cls(read_vocabulary(student), read_vocabulary(teacher))

    def align(self, student_ids: Sequence[int], teacher_ids: Sequence[int]) -> list[Span]:
        """Spans of an answer in its two tokenizations."""
        return align(self.student.to_bytes(student_ids), self.teacher.to_bytes(teacher_ids))

    def project(
        self,
        student_ids: Sequence[int],
        teacher_ids: Sequence[int],
        top_ids: torch.Tensor,
        top_logprobs: torch.Tensor,
        target_logprobs: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """One answer's cached values, (n, k), (n, k) and (n,) by teacher token, as the student needs them: by span.

        span_lengths (S,): student tokens of each span. span_ids (S, k): the student's token that ends the span with the
        same bytes as the teacher's cached token, −1 where there is none. span_logprobs (S, k): the teacher's
        log-probability of the span with that end, −inf where the student cannot write it.
        """
        student, teacher = self.student.to_bytes(student_ids), self.teacher.to_bytes(teacher_ids)
        spans = align(student, teacher)
        last = torch.tensor([span.teacher[-1] for span in spans], dtype=torch.long)
        first = torch.tensor([span.teacher[0] for span in spans], dtype=torch.long)
        before = nn.functional.pad(target_logprobs.double().cumsum(0), (1, 0))
        ids = self.shared[top_ids[last].clamp(max=len(self.shared) - 1)]
        extra_spaces = len(b"".join(teacher)) - len(b"".join(student))  # in front of the first span; < 0: the student's
        for row, span in enumerate(spans):
            spaces = extra_spaces if row == 0 else 0
            if len(span.student) > 1 or len(span.teacher) > 1 or spaces:
                student_path = b" " * max(spaces, 0) + b"".join(student[n] for n in span.student[:-1])
                teacher_path = b" " * max(-spaces, 0) + b"".join(teacher[n] for n in span.teacher[:-1])
                tokens = top_ids[span.teacher[-1]].tolist()
                ids[row] = torch.tensor([self._last_token(student_path, teacher_path, token) for token in tokens])
        logprobs = top_logprobs[last] + (before[last] - before[first]).to(top_logprobs.dtype)[:, None]
        lengths = torch.tensor([len(span.student) for span in spans], dtype=torch.long)
        return {"span_lengths": lengths, "span_ids": ids, "span_logprobs": logprobs.masked_fill(ids < 0, -torch.inf)}

    def _last_token(self, student_path: bytes, teacher_path: bytes, teacher_token: int) -> int:
        """The student's token after its path that gives the same bytes as the teacher's path and token, or −1."""
        piece = self.teacher.pieces[teacher_token] if teacher_token < len(self.teacher.pieces) else None
        if not piece or self.teacher.ids[piece] != teacher_token:
            return -1
        text = teacher_path + piece
        return self.student.ids.get(text[len(student_path) :], -1) if text.startswith(student_path) else -1


def measure_spans(
    aligner: TokenAligner, student: Sequence[Example], teacher: Sequence[Example]
) -> list[tuple[int, int, int]]:
    """Size of every span in the answers to the same questions: student tokens, teacher tokens, bytes; no end tokens."""
    sizes = []
    for ours, theirs in zip(student, teacher, strict=True):
        answers = ours.input_ids[ours.loss_start :], theirs.input_ids[theirs.loss_start :]
        pieces = aligner.student.to_bytes(answers[0])
        for span in aligner.align(*answers):
            text = b"".join(pieces[position] for position in span.student)
            if text != END:
                sizes.append((len(span.student), len(span.teacher), len(text)))
    return sizes


class AlignedCache:
    """A teacher cache, read for a student with another tokenizer.

    `student` and `teacher` are the same questions in the same order, the teacher's as they were captured. Raises
    MedkitError, before any training, for the first answer that the two tokenize as different texts.
    """

    def __init__(self, cache: TeacherCache, student: Sequence[Example], teacher: Sequence[Example], aligner):
        self.cache, self.aligner = cache, aligner
        self.answers = [
            (s.input_ids[s.loss_start :], t.input_ids[t.loss_start :]) for s, t in zip(student, teacher, strict=True)
        ]
        for answer in self.answers:
            aligner.align(*answer)

    def batch(self, numbers: list[int]) -> dict[str, torch.Tensor]:
        """Extras of a batch for `SpanLoss`: spans in the order of its labelled positions."""
        projected = []
        for number in numbers:
            cached = self.cache.example(number)
            values = (cached["teacher_ids"], cached["teacher_logprobs"], cached["teacher_target_logprobs"])
            projected.append(self.aligner.project(*self.answers[number], *values))
        return {name: torch.cat([one[name] for one in projected]) for name in projected[0]}


def chain_logprobs(logprobs: torch.Tensor, targets: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Log-probability (S, V) of a span's earlier target tokens followed by token v.

    logprobs (N, V), targets (N,); lengths (S,): tokens of each span, which sum to N. At the span's last target token it
    is the probability of the span's text. These are the "bayesian" merged probabilities of TRL's GOLD trainer.
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

    logits (N, V) and targets (N,) of the student; the others as `TokenAligner.project` returns them. It is 0 iff the
    probabilities of these events are equal. With one tokenizer it is never above the dense KL. With two it does not
    bound the KL over texts, because each model gives the probability of one path of tokens only.
    """
    missing = span_ids < 0
    events = chain_logprobs(logits.log_softmax(-1), targets, span_lengths).gather(-1, span_ids.clamp(min=0))
    p, q = with_rest(span_logprobs), with_rest(events.masked_fill(missing, -torch.inf))
    difference = (p - q).masked_fill(nn.functional.pad(missing, (0, 1)), 0.0)  # impossible for both
    return (p.exp() * difference).sum(-1)


@dataclass(frozen=True)
class SpanLoss:
    """λ1·CE + λ2·KL over spans, for a teacher with another tokenizer; extras come from `AlignedCache`."""

    ce_weight: float
    kl_weight: float

    def __call__(self, predicted: Predicted, extras: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        ce = nn.functional.cross_entropy(predicted.logits, predicted.targets, reduction="sum")
        spans = (extras["span_lengths"], extras["span_ids"], extras["span_logprobs"])
        kl = span_kl(predicted.logits, predicted.targets, *spans).sum()
        return self.ce_weight * ce + self.kl_weight * kl, {"ce": ce.detach(), "span_kl": kl.detach()}
