"""Batches, the loss mask, and measures over rows: each example once, and as if it stood alone."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import SENTENCES

from medkit.modeling import batches
from medkit.modeling.batches import PASSES, Example, bucket_by_length

PAD = 0


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
def test_logits_and_hidden_states_of_a_batch_are_those_of_each_example_alone(make_llama, alike, attention, batch):
    model = make_llama(attn_implementation=attention)
    with torch.no_grad():
        predicted = batches.predict(model, BATCHES[batch](alike), [0, 3])
        alone = [(model(torch.tensor([e.input_ids]), output_hidden_states=True), e.loss_start - 1) for e in alike]
    assert predicted.targets.tolist() == [t for e in alike for t in e.input_ids[e.loss_start :]]
    expected = torch.cat([output.logits[0, start:-1] for output, start in alone])
    torch.testing.assert_close(predicted.logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.lm_head(predicted.hidden[3]), expected, rtol=0, atol=1e-5)
    assert list(predicted.hidden) == [0, 3]
    for layer, hidden in predicted.hidden.items():
        expected = torch.cat([output.hidden_states[layer][0, start:-1] for output, start in alone])
        torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)


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


def test_the_head_sees_labelled_positions_alone(make_llama, alike):
    model, seen = make_llama(), []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    for make in BATCHES.values():
        batches.predict(model, make(alike))
    hook.remove()
    assert seen == [(sum(e.num_predicted for e in alike), model.config.hidden_size)] * 3


@pytest.mark.parametrize("share", [True, False])
def test_a_window_hides_what_lies_further_back(make_llama, alike, share):
    model = make_llama(kind="Mistral", sliding_window=3)
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


def test_letter_forms_hold_what_follows_the_chat_header_and_what_follows_answer(tokenizer):
    """The whole text, cut where the prompt's tokens end, gives one of the forms, whatever the prompt ends with."""
    for prompt in ("<|im_start|>assistant\n", "Answer:", "Answer: ", "[/INST]"):
        whole = tokenizer(prompt + "A", add_special_tokens=False).input_ids
        spaced = tokenizer(prompt + " A", add_special_tokens=False).input_ids
        assert [whole[-1]] in batches.letter_forms(tokenizer, "A")
        assert [spaced[-1]] in batches.letter_forms(tokenizer, "A")


def test_letter_forms_of_a_tokenizer_that_prepends_a_space(make_pieces_tokenizer):
    texts = [text.replace("\n", " ") for text in SENTENCES]
    tokenizer = make_pieces_tokenizer(texts, lead=True, byte_fallback=False)
    assert tokenizer("A", add_special_tokens=False).input_ids == [tokenizer.convert_tokens_to_ids("▁A")]
    forms = batches.letter_forms(tokenizer, "A")
    assert sorted(tokenizer.convert_ids_to_tokens(ids)[0] for ids in forms) == ["A", "▁A"]
    with pytest.raises(ValueError, match="'Z' is not one token"):
        batches.letter_forms(tokenizer, "Z")


def test_losses_are_means_over_the_predicted_tokens_and_ignore_dropout(make_llama, make_examples):
    model, examples = make_llama(attention_dropout=0.5).train(), make_examples(4)
    found = batches.predict_examples(model, examples)
    logits, model = batches.collect_logits(model, examples), model.eval()
    with torch.no_grad():
        for example, nll in zip(examples, found.nll, strict=True):
            ids = torch.tensor([example.input_ids])
            labels = ids.where(torch.arange(ids.shape[1]) >= example.loss_start, -100)
            assert nll == pytest.approx(model(ids, labels=labels).loss.item(), abs=1e-5)
    assert torch.equal(found.logits, logits)


def test_logits_of_a_bfloat16_model_take_two_bytes_and_are_compared_in_float32(make_llama, make_examples, monkeypatch):
    monkeypatch.setattr(batches, "DRIFT_ROWS", 3)  # several parts, the last one shorter
    before, after = (batches.collect_logits(make_llama(seed=n).bfloat16(), make_examples(4)) for n in (0, 1))
    assert before.dtype == after.dtype == torch.bfloat16 and len(before) % 3 and len(before) > 6
    kl = torch.nn.functional.kl_div(
        *(logits.float().log_softmax(-1) for logits in (after, before)), log_target=True, reduction="none"
    )
    drift = batches.measure_drift(before, after)
    assert drift["kl_nats"] == pytest.approx(kl.sum(-1).mean().item(), rel=1e-5)
    assert drift["max_abs_logit"] == (before.float() - after.float()).abs().max().item()
    assert drift["top1_changed"] == (before.argmax(-1) != after.argmax(-1)).float().mean().item()


def cost(batches, lengths, limit):
    """What `bucket_by_length` keeps small: tokens read, padding included, and what the passes themselves take."""
    return sum(lengths[batch[0]] * len(batch) + limit / PASSES for batch in batches)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=6), st.integers(1, 80))
def test_buckets_hold_everything_once_and_no_other_way_to_cut_is_better(lengths, limit):
    order, ways = sorted(range(len(lengths)), key=lambda i: -lengths[i]), []
    for number in range(max(1, len(order))):
        for cuts in combinations(range(1, len(order)), number):
            edges = [0, *cuts, len(order)]
            ways.append([order[a:b] for a, b in pairwise(edges) if a < b])
    allowed = [w for w in ways if all(len(b) == 1 or lengths[b[0]] * len(b) <= limit for b in w)]
    found = bucket_by_length(lengths, limit)
    assert [lengths[i] for batch in found for i in batch] == [lengths[i] for i in order]
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or lengths[batch[0]] * len(batch) <= limit for batch in found)
    assert cost(found, lengths, limit) == pytest.approx(min(cost(way, lengths, limit) for way in allowed))
