"""Spans tile both tokenizations, probabilities multiply to the token's own, and what is compared is the same bytes."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from medkit.distillation import cross_tokenizer, losses, teacher_cache
from medkit.distillation.cross_tokenizer import END, TokenAligner, align, chain_logprobs, read_vocabulary, span_kl
from medkit.modeling import loading, trainer
from medkit.modeling.batches import Example, Predicted
from medkit.params import load_params
from medkit.stage import ROOT, MedkitError

WORDS = "Scurvy is caused by too little vitamin C: 5 µg of it, ≥ 3 days, café, µg/kg 😀 \n\tthe the that this"


@pytest.fixture(scope="module")
def pieces_tokenizer(make_pieces_tokenizer):
    return make_pieces_tokenizer((WORDS,))


def vocabulary(*pieces):
    """A vocabulary of these pieces; the last token ends the answer."""
    pieces = [piece.encode() if isinstance(piece, str) else piece for piece in pieces] + [END]
    return cross_tokenizer.Vocabulary(pieces, {piece: number for number, piece in enumerate(pieces) if piece})


def logprobs_of(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def some_logits(rows, size, seed=0):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def test_what_does_not_tell_its_bytes_is_refused(make_pieces_tokenizer):
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()  # forgets where spaces were
    with pytest.raises(MedkitError, match="WordPiece"):
        read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend))
    tokenizer = make_pieces_tokenizer((WORDS,), byte_fallback=False)
    ids = tokenizer("⚕", add_special_tokens=False).input_ids
    with pytest.raises(MedkitError, match=f"token {tokenizer.unk_token_id} of an answer writes no text"):
        read_vocabulary(tokenizer).to_bytes(ids)


texts = st.text(
    st.one_of(st.sampled_from("thevitamn C5µ≥é😀\n"), st.characters(exclude_categories=["Cs"], exclude_characters="▁")),
    max_size=40,
)


@pytest.fixture(scope="module")
def led_tokenizers(tokenizer, make_pieces_tokenizer):
    """Byte-level (None), and SentencePiece-like without and with a space put in front: each with its vocabulary."""
    found = {None: tokenizer, False: make_pieces_tokenizer((WORDS,)), True: make_pieces_tokenizer((WORDS,), lead=True)}
    return {name: (one, read_vocabulary(one)) for name, one in found.items()}


@given(text=texts, lead=st.booleans())
@settings(max_examples=40, deadline=None)
def test_spans_tile_both_tokenizations(text, lead, led_tokenizers):
    student, teacher = (
        known.to_bytes([*one(text, add_special_tokens=False).input_ids, one.eos_token_id])
        for one, known in (led_tokenizers[None], led_tokenizers[lead])
    )
    spans = align(student, teacher)
    assert [place for span in spans for place in span.student] == list(range(len(student)))
    assert [place for span in spans for place in span.teacher] == list(range(len(teacher)))
    written = [b"".join(student[p] for p in span.student) for span in spans]
    theirs = [b"".join(teacher[p] for p in span.teacher) for span in spans]
    assert written[1:] == theirs[1:] and written[0].lstrip(b" ") == theirs[0].lstrip(b" ")
    assert b"".join(written) == text.encode() + END
    left = [[sum(map(len, pieces[n:])) for n in range(1, len(pieces))] for pieces in (student, teacher)]
    common = set(left[0]) & set(left[1]) - {len(text.encode() + END)}
    assert len(spans) == len(common) + 1, "a span is cut wherever both have a border"


def test_span_kl_by_hand_of_a_word_in_three_for_the_teacher():
    """Teacher: a, b, then c (0.5), d (0.25) or the end; the student has "abc", "abd", and "abcd": none."""
    aligner = TokenAligner(vocabulary("abc", "abd", "abcd"), vocabulary("a", "b", "c", "d"))
    top = torch.tensor([[0, 1], [1, 0], [2, 3]])
    logprobs = logprobs_of([0.8, 0.1], [0.5, 0.3], [0.5, 0.25])
    projected = aligner.project([0], [0, 1, 2], top, logprobs, logprobs_of([0.8, 0.5, 0.5])[0])
    assert projected["span_ids"].tolist() == [[0, 1]]
    assert projected["span_logprobs"].exp().tolist() == [pytest.approx([0.4 * 0.5, 0.4 * 0.25])]
    student = logprobs_of([0.4, 0.1, 0.3, 0.2])
    expected = 0.2 * math.log(0.2 / 0.4) + 0.1 * math.log(0.1 / 0.1) + 0.7 * math.log(0.7 / 0.5)
    assert span_kl(student, torch.tensor([0]), **projected).item() == pytest.approx(expected, rel=1e-5)


def test_a_space_in_front_is_no_difference():
    """Teacher " yes" against student "yes": " no" is the student's "no", and "no" without a space is nothing."""
    aligner = TokenAligner(vocabulary("yes", "no"), vocabulary(" yes", " no", "no"))
    logprobs = logprobs_of([0.6, 0.3, 0.1], [0.0, 0.0, 1.0])
    projected = aligner.project([0, 2], [0, 3], torch.tensor([[0, 1, 2], [3, 0, 1]]), logprobs, torch.zeros(2).double())
    assert projected["span_ids"].tolist() == [[0, 1, -1], [2, -1, -1]]  # in the middle of a text " yes" is not "yes"
    back = TokenAligner(vocabulary(" yes", " no", "no"), vocabulary("yes", "no"))
    projected = back.project([0], [0], torch.tensor([[0, 1, 2]]), logprobs[:1], torch.zeros(1).double())
    assert projected["span_ids"].tolist() == [[0, 1, -1]]  # to end at once is not to write a space


def test_padded_rows_of_the_teacher_and_second_spellings_are_no_events(pieces_tokenizer, tokenizer):
    aligner = TokenAligner(read_vocabulary(tokenizer), read_vocabulary(pieces_tokenizer))
    names, own = pieces_tokenizer.get_vocab(), tokenizer.convert_tokens_to_ids("t")
    top = torch.tensor([[names["t"], names["<0x74>"], len(names) + 7, names["<pad>"]]])
    projected = aligner.project([own], [names["t"]], top, logprobs_of([0.4, 0.3, 0.2, 0.1]), torch.zeros(1))
    assert projected["span_ids"].tolist() == [[own, -1, -1, -1]]
    assert [aligner._last_token(b" ", b" ", token) for token in top[0].tolist()] == [own, -1, -1, -1]


def cached_of(logits, targets, k):
    return *teacher_cache.top_k_logprobs(logits, k), logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


@pytest.mark.parametrize("k", [8, "all"])
def test_one_tokenizer_gives_the_sparse_divergence(k, tokenizer):
    known = read_vocabulary(tokenizer)
    ids = [*tokenizer("Vitamin C prevents scurvy, 5 µg.", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    size, targets = len(known.pieces), torch.tensor(ids)
    teacher, student = some_logits(len(ids), size, 1), some_logits(len(ids), size, 2)
    blank = torch.tensor([piece is None for piece in known.pieces])  # special tokens are no text: here none is likely
    teacher[:, blank] = student[:, blank] = -40
    top_ids, top, target = cached_of(teacher, targets, size - int(blank.sum()) if k == "all" else k)
    projected = TokenAligner(known, known).project(ids, ids, top_ids, top, target)
    assert projected["span_lengths"].tolist() == [1] * len(ids)
    found = span_kl(student, targets, **projected)
    assert torch.allclose(found, losses.sparse_divergence(student, top_ids, top), atol=1e-5)


@pytest.fixture(scope="module")
def two_readings(tokenizer, pieces_tokenizer):
    """One answer in two tokenizations, random logits of both, and what `project` makes of the teacher's."""
    answer = "Vitamin C prevents scurvy, 5 µg ≥ 😀 the"
    both = tokenizer, pieces_tokenizer
    ids = [[*one(answer, add_special_tokens=False).input_ids, one.eos_token_id] for one in both]
    known = [read_vocabulary(one) for one in both]
    logits = [some_logits(len(i), len(v.pieces) + 5, seed) for seed, (i, v) in enumerate(zip(ids, known, strict=True))]
    aligner = TokenAligner(*known)
    return SimpleNamespace(ids=ids, known=known, logits=logits, aligner=aligner, targets=[torch.tensor(i) for i in ids])


def projected_of(two, k=20):
    return two.aligner.project(*two.ids, *cached_of(two.logits[1], two.targets[1], k))


def test_events_are_the_same_bytes_on_both_sides(two_readings):
    """Every event of `project`, spelt out: what the student has written with it is what the teacher has."""
    two, k = two_readings, 40
    projected = projected_of(two, k)
    top_ids, *_ = cached_of(two.logits[1], two.targets[1], k)
    spelt = [v.to_bytes(i) for v, i in zip(two.known, two.ids, strict=True)]
    spans = align(*spelt)
    assert len({(len(span.student), len(span.teacher)) for span in spans}) >= 3, "the case is no case"
    shared = 0
    for span, ids in zip(spans, projected["span_ids"].tolist(), strict=True):
        own, path = (b"".join(s[p] for p in places[:-1]) for s, places in zip(spelt, span, strict=True))
        for token, kept in zip(ids, top_ids[span.teacher[-1]].tolist(), strict=True):
            piece = two.known[1].pieces[kept] if kept < len(two.known[1].pieces) else None
            if token >= 0:
                assert own + two.known[0].pieces[token] == path + piece
                shared += 1
            elif piece is not None and two.known[1].ids[piece] == kept:  # no second spelling
                assert not (path + piece).startswith(own) or (path + piece)[len(own) :] not in two.known[0].ids
    assert shared > len(spans)


def test_gradients_are_finite_where_nothing_is_shared_and_where_rounding_leaves_less_than_nothing(two_readings):
    two = two_readings
    projected, logits = projected_of(two), two.logits[0].clone().requires_grad_()
    nothing = {**projected, "span_ids": torch.full_like(projected["span_ids"], -1)}
    nothing["span_logprobs"] = torch.full_like(projected["span_logprobs"], -torch.inf)
    kl = span_kl(logits, two.targets[0], **nothing)
    assert kl.abs().max() < 1e-9, "with nothing in common there is nothing to learn"
    (gradient,) = torch.autograd.grad(kl.sum(), logits)
    assert torch.isfinite(gradient).all()
    # fp16 log-probabilities can add up to more than 1, by more than the floor
    logits, logprobs = torch.zeros(1, 3, requires_grad=True), torch.tensor([0.7001, 0.3001]).log()[None]
    kl = span_kl(logits, torch.tensor([0]), torch.tensor([1]), torch.tensor([[0, 1]]), logprobs)
    assert kl.item() == pytest.approx(0.7 * math.log(0.7 * 3) + 0.3 * math.log(0.3 * 3), abs=1e-3)
    (gradient,) = torch.autograd.grad(kl.sum(), logits)
    assert torch.isfinite(gradient).all()


def test_a_batch_is_its_answers_one_after_the_other(tmp_path, tokenizer, pieces_tokenizer, make_llama):
    answers = ["vitamin C", "the café", "5 µg", "≥ 3 days", "this", "that", "scurvy is caused", "too little of it"]
    examples = []
    for one, prompt in ((tokenizer, [1, 5]), (pieces_tokenizer, [7])):
        written = [[*one(a, add_special_tokens=False).input_ids, one.eos_token_id] for a in answers]
        examples.append([Example([*prompt, *ids], len(prompt)) for ids in written])
    load = partial(make_llama, vocab_size=400)
    cache = teacher_cache.capture_teacher(load, examples[1], tmp_path / "cache", 40, 3, "key")
    aligner = TokenAligner(read_vocabulary(tokenizer), read_vocabulary(pieces_tokenizer))
    read = cross_tokenizer.AlignedCache(cache, *examples, aligner)
    whole, parts = read.batch([5, 2, 0]), [read.batch([n]) for n in (5, 2, 0)]
    assert all(torch.equal(whole[name], torch.cat([part[name] for part in parts])) for name in whole)
    assert whole["span_lengths"].sum() == sum(examples[0][n].num_predicted for n in (5, 2, 0))
    with pytest.raises(MedkitError, match="both must write one text"):  # before any training
        cross_tokenizer.AlignedCache(cache, examples[0], examples[1][1:] + examples[1][:1], aligner)


def test_loss_is_the_weighted_sum_of_its_terms(two_readings):
    two = two_readings
    projected = projected_of(two)
    predicted = Predicted(two.logits[0], two.targets[0], {})
    total, terms = cross_tokenizer.SpanLoss(0.25, 2.0)(predicted, projected)
    assert terms["ce"].item() == pytest.approx(trainer.cross_entropy(predicted, {})[0].item())
    assert terms["span_kl"].item() == pytest.approx(span_kl(two.logits[0], two.targets[0], **projected).sum().item())
    assert total.item() == pytest.approx(0.25 * terms["ce"].item() + 2.0 * terms["span_kl"].item())


def test_the_chain_rule_is_golds_bayesian_merge(two_readings, no_network):
    """In TRL's ULD loss with weight on the distillation alone.

    One position of prompt goes before: its logits predict the first token.
    """
    merged, trainer = [], pytest.importorskip("trl.experimental.gold.gold_trainer")

    class Recording(trainer.ULDLoss):
        def _merge_probabilities_with_alignment_groups(self, *args):
            merged.append(super()._merge_probabilities_with_alignment_groups(*args))
            return merged[-1]

    settings = {"crossentropy_weight": 0.0, "distillation_weight": 1.0, "token_merge_strategy": "bayesian"}
    settings |= {"student_temperature": 1.0, "teacher_temperature": 1.0}
    settings |= {"skip_student_eos": False, "skip_teacher_eos": False}
    gold = Recording(SimpleNamespace(use_extended_uld=True, **{f"uld_{k}": v for k, v in settings.items()}))
    two, ids, labels, offsets = two_readings, [], [], []
    pieces = [known.to_bytes(ids) for known, ids in zip(two.known, two.ids, strict=True)]
    for own, written in zip(two.ids, pieces, strict=True):
        ends = torch.tensor([0, *map(len, written)]).cumsum(0)
        ids.append(torch.tensor([[0, *own]]))
        labels.append(torch.tensor([[-100, *own]]))
        offsets.append(torch.cat([torch.zeros(1, 2).long(), torch.stack([ends[:-1], ends[1:]], -1)])[None])
    logits = [torch.cat([rows, rows[:1]])[None] for rows in two.logits]  # the last position's predict nothing
    gold(*logits, *labels, *ids, *offsets)
    spans = align(*pieces)
    assert [len(one) for one in merged] == [len(spans)] * 2
    for side in (0, 1):
        lengths = torch.tensor([len(span[side]) for span in spans])
        ours = chain_logprobs(two.logits[side].log_softmax(-1), two.targets[side], lengths).exp()
        assert (ours - merged[side]).abs().max() < 1e-6


@pytest.mark.weights
def test_every_token_of_smollm2_has_its_bytes():
    params = load_params(ROOT / "params" / "smoke.yaml")
    tokenizer = loading.load_tokenizer(loading.local_folder(params.models.teacher))
    known = read_vocabulary(tokenizer)
    assert len(known.ids) > 0.99 * len(tokenizer)
    for text in ("Diseases of the circulatory system", "5 µg ≥ 3, café 😀", "", "β-blocker\n\n", "1,25-(OH)₂D₃"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert b"".join(known.to_bytes([*ids, tokenizer.eos_token_id])) == text.encode() + END
