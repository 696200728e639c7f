"""Batches, the loss mask, and measures over rows: each example once, and as if it stood alone."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medkit.modeling import batches
from medkit.modeling.batches import PASSES, Example, bucket_by_length

PAD = 0


def test_collate_aligns_to_the_right_and_counts_positions_from_the_first_token(make_examples):
    examples = make_examples(7)
    batch = batches.collate(examples, PAD)
    for row, example in enumerate(examples):
        n = len(example.input_ids)
        assert batch["input_ids"][row, -n:].tolist() == example.input_ids
        assert (batch["input_ids"][row, :-n] == PAD).all()
        assert batch["attention_mask"][row].tolist() == [0] * (batch["input_ids"].shape[1] - n) + [1] * n
        assert batch["position_ids"][row, -n:].tolist() == list(range(n))
    following = batch["input_ids"].flatten()[batch["predicted_at"] + 1]
    assert torch.equal(following, batch["labels"])
    assert batch["labels"].tolist() == [token for e in examples for token in e.input_ids[e.loss_start :]]


BATCHES = {
    "padded": lambda examples: batches.collate(examples, PAD),
    "packed": batches.pack,
    "packed, nothing shared": lambda examples: batches.pack(examples, share=False),
}


@pytest.fixture
def alike(make_examples):
    """Examples of which many begin alike, one is another's beginning, and one is there twice."""
    long = Example([5, 9, 17, 33, 4, 8, 21, 7], 3)
    branch = Example([*long.input_ids[:5], 60, 61, 62], 5)
    return [*make_examples(4), long, branch, Example(long.input_ids[:6], 1), long, Example([5, 9], 1)]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_predicted_logits_of_a_batch_are_those_of_each_example_alone(make_llama, alike, attention, batch):
    model = make_llama(attn_implementation=attention)
    with torch.no_grad():
        predicted = batches.predict(model, BATCHES[batch](alike))
        alone = [model(torch.tensor([e.input_ids])).logits[0, e.loss_start - 1 : -1] for e in alike]
    assert predicted.targets.tolist() == [t for e in alike for t in e.input_ids[e.loss_start :]]
    torch.testing.assert_close(predicted.logits, torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("layer", [0, 3])
def test_hidden_states_of_a_batch_are_those_that_made_the_logits(make_llama, alike, layer, batch):
    model, examples, made = make_llama(), alike, BATCHES[batch](alike)
    with torch.no_grad():
        found = batches.predict(model, made, [layer])
        alone = [
            model(torch.tensor([e.input_ids]), output_hidden_states=True).hidden_states[layer][0, e.loss_start - 1 : -1]
            for e in examples
        ]
    assert list(found.hidden) == [layer]
    torch.testing.assert_close(found.hidden[layer], torch.cat(alone), rtol=0, atol=1e-5)
    if layer == 3:
        torch.testing.assert_close(model.lm_head(found.hidden[layer]), found.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", ["packed", "packed, nothing shared"])
def test_gradients_of_a_packed_batch_are_those_of_a_padded_one(make_llama, alike, batch):
    gradients = []
    for name in ("padded", batch):
        model = make_llama()
        predicted = batches.predict(model, BATCHES[name](alike))
        torch.nn.functional.cross_entropy(predicted.logits, predicted.targets, reduction="sum").backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-4)


def test_a_packed_batch_reads_each_beginning_once_and_no_last_token():
    examples = [Example([5, 6, 7, 8], 2), Example([5, 6, 9, 8], 3), Example([5, 6, 7, 1], 1)]
    assert batches.pack(examples)["input_ids"].tolist() == [[5, 6, 7, 9]]
    apart = batches.pack(examples, share=False)
    assert apart["input_ids"].tolist() == [[5, 6, 7, 5, 6, 9, 5, 6, 7]]
    assert apart["position_ids"].tolist() == [[0, 1, 2] * 3]
    assert "attention_mask" not in apart


def test_the_head_sees_labelled_positions_alone(make_llama, alike):
    model, seen = make_llama(), []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    for make in BATCHES.values():
        batches.predict(model, make(alike))
    hook.remove()
    assert seen == [(sum(e.num_predicted for e in alike), model.config.hidden_size)] * 3


@pytest.mark.parametrize("share", [True, False])
def test_a_window_hides_what_lies_further_back(make_llama, alike, share):
    from transformers import MistralConfig, MistralForCausalLM

    config = make_llama().config.to_dict() | {"sliding_window": 3, "model_type": "mistral"}
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**{k: v for k, v in config.items() if k != "architectures"})).eval()
    with torch.no_grad():
        found = batches.predict(model, batches.pack(alike, share)).logits
        alone = [model(torch.tensor([e.input_ids])).logits[0, e.loss_start - 1 : -1] for e in alike]
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-5)


def test_loss_covers_the_answer_and_its_end_token_and_nothing_else(tokenizer, questions):
    known = questions[questions.answer >= 0]
    for example, row in zip(batches.encode_questions(tokenizer, known), known.itertuples(), strict=True):
        predicted = example.input_ids[example.loss_start :]
        assert predicted[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(predicted[:-1]) == row.options[row.answer]
        given = tokenizer.decode(example.input_ids[: example.loss_start])
        assert row.question in given and row.context in given and given.endswith("assistant\n")


def test_loss_of_a_transfer_row_covers_the_question_text_and_nothing_else(tokenizer, questions):
    row = questions[questions.split == "transfer"]
    (example,) = batches.encode_questions(tokenizer, row)
    assert tokenizer.decode(example.input_ids[example.loss_start :]) == row.question.item()


def test_transfer_row_without_a_chat_template(make_tokenizer, questions):
    tokenizer, row = make_tokenizer(chat_template=None), questions[questions.split == "transfer"]
    (example,) = batches.encode_questions(tokenizer, row)
    assert tokenizer.decode(example.input_ids[example.loss_start :]).strip() == row.question.item()


@pytest.fixture(scope="session")
def make_sentencepiece_like():
    """A tokenizer that puts "▁" before the first word and for every space, as Llama 2's and Mistral's do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def make(pieces):
        vocabulary = {piece: number for number, piece in enumerate(["<unk>", "</s>", "\n", "▁", *pieces])}
        backend = Tokenizer(models.BPE(vocabulary, [("▁", p[1:]) for p in pieces if len(p) == 2], unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")

    return make


def test_letter_forms_hold_what_follows_the_chat_header_and_what_follows_answer(tokenizer):
    """The whole text, cut where the prompt's tokens end, gives one of the forms, whatever the prompt ends with."""
    for prompt in ("<|im_start|>assistant\n", "Answer:", "Answer: ", "[/INST]"):
        whole = tokenizer(prompt + "A", add_special_tokens=False).input_ids
        spaced = tokenizer(prompt + " A", add_special_tokens=False).input_ids
        assert [whole[-1]] in batches.letter_forms(tokenizer, "A")
        assert [spaced[-1]] in batches.letter_forms(tokenizer, "A")


def test_letter_forms_of_a_tokenizer_that_prepends_a_space(make_sentencepiece_like):
    tokenizer = make_sentencepiece_like(["A", "B", "▁A", "▁B"])
    assert tokenizer("A", add_special_tokens=False).input_ids == [tokenizer.convert_tokens_to_ids("▁A")]
    forms = batches.letter_forms(tokenizer, "A")
    assert sorted(tokenizer.convert_ids_to_tokens(ids)[0] for ids in forms) == ["A", "▁A"]


def test_a_letter_that_is_no_token_is_an_error(make_sentencepiece_like):
    with pytest.raises(ValueError, match="'C' is not one token"):
        batches.letter_forms(make_sentencepiece_like(["A", "▁A"]), "C")


def test_each_example_is_predicted_once_and_as_if_alone(make_llama, make_examples, monkeypatch):
    monkeypatch.setattr(batches, "PACKED_TOKENS", 60)
    model, examples = make_llama(), make_examples(7)
    seen = []
    for rows, found in batches.iterate_predicted(model, examples):
        alone = [batches.collect_logits(model, [examples[i]]) for i in rows]
        torch.testing.assert_close(found.logits, torch.cat(alone), rtol=0, atol=1e-5)
        assert found.targets.tolist() == [t for i in rows for t in examples[i].input_ids[examples[i].loss_start :]]
        seen += rows
    assert sorted(seen) == list(range(7))


def test_losses_equal_the_hand_calculation_and_ignores_dropout(make_llama, make_examples):
    model, examples = make_llama(attention_dropout=0.5).train(), make_examples(4)
    found = batches.predict_examples(model, examples)
    assert torch.equal(found.logits, batches.collect_logits(model, examples))
    for example, nll in zip(examples, found.nll, strict=True):
        with torch.no_grad():
            logprobs = model.eval()(torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
        by_hand = [
            -logprobs[i - 1, example.input_ids[i]].item() for i in range(example.loss_start, len(example.input_ids))
        ]
        assert nll == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-5)


def test_drift_is_zero_iff_the_logits_are_equal():
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    assert batches.measure_drift(logits, logits.clone()) == {
        "positions": 5, "kl_nats": 0.0, "max_abs_logit": 0.0, "top1_changed": 0.0
    }  # fmt: skip
    moved = logits.clone()
    moved[2, logits[2].argmin()] = logits[2].max() + 1
    drift = batches.measure_drift(logits, moved)
    assert drift["top1_changed"] == pytest.approx(1 / 5)
    assert drift["kl_nats"] > 0
    assert drift["max_abs_logit"] == pytest.approx((logits[2].max() + 1 - logits[2].min()).item())


def cost(batches, lengths, limit):
    """What `bucket_by_length` keeps small: tokens read, padding included, and what the passes themselves take."""
    return sum(lengths[batch[0]] * len(batch) + limit / PASSES for batch in batches)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=60), st.integers(1, 200))
def test_batches_hold_everything_once_within_the_limit(lengths, limit):
    batches = bucket_by_length(lengths, limit)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    shown = [lengths[i] for batch in batches for i in batch]
    assert shown == sorted(shown, reverse=True)
    assert all(len(batch) == 1 or lengths[batch[0]] * len(batch) <= limit for batch in batches)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.integers(1, 80))
def test_no_other_way_to_cut_is_better(lengths, limit):
    order, ways = sorted(range(len(lengths)), key=lambda i: -lengths[i]), []
    for number in range(len(order)):
        for cuts in combinations(range(1, len(order)), number):
            edges = [0, *cuts, len(order)]
            ways.append([order[a:b] for a, b in pairwise(edges)])
    allowed = [w for w in ways if all(len(b) == 1 or lengths[b[0]] * len(b) <= limit for b in w)]
    best = min(cost(way, lengths, limit) for way in allowed)
    assert cost(bucket_by_length(lengths, limit), lengths, limit) == pytest.approx(best)
