"""Batches, the loss mask, and measures over rows: each example once, and as if it stood alone."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medkit import batching, models, prompts
from medkit.batching import IGNORE, Example
from medkit.outputs import ROOT
from medkit.params import load_params

PAD = 0


# --- batches -------------------------------------------------------------------------------------------------------


def test_collate_aligns_to_the_right_and_counts_positions_from_the_first_token(make_examples):
    examples = make_examples(7)
    batch = batching.collate(examples, PAD)
    for row, example in enumerate(examples):
        n, answer = len(example.input_ids), example.input_ids[example.loss_start :]
        assert batch["input_ids"][row, -n:].tolist() == example.input_ids
        assert (batch["input_ids"][row, :-n] == PAD).all()
        assert batch["attention_mask"][row].tolist() == [0] * (batch["input_ids"].shape[1] - n) + [1] * n
        assert batch["position_ids"][row, -n:].tolist() == list(range(n))
        assert batch["labels"][row, -len(answer) :].tolist() == answer
        assert (batch["labels"][row, : -len(answer)] == IGNORE).all()
    assert batch["labels"].shape[1] == max(len(e.input_ids) - e.loss_start for e in examples)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_predicted_logits_of_a_padded_batch_are_those_of_each_row_alone(make_llama, make_examples, attention):
    model = make_llama(attn_implementation=attention)
    examples = [*make_examples(6), Example([5, 9, 17, 33, 4, 8], 1)]
    with torch.no_grad():
        logits, targets = batching.predicted_logits(model, batching.collate(examples, PAD))
        alone = [model(torch.tensor([e.input_ids])).logits[0, e.loss_start - 1 : -1] for e in examples]
    assert targets.tolist() == [t for e in examples for t in e.input_ids[e.loss_start :]]
    torch.testing.assert_close(logits, torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_hidden_states_of_a_padded_batch_are_those_that_made_the_logits(make_llama, make_examples, layer):
    model, examples = make_llama(), make_examples(6)
    with torch.no_grad():
        found = batching.predict(model, batching.collate(examples, PAD), [layer])
        logits, targets = batching.predicted_logits(model, batching.collate(examples, PAD))
        alone = [
            model(torch.tensor([e.input_ids]), output_hidden_states=True).hidden_states[layer][0, e.loss_start - 1 : -1]
            for e in examples
        ]
    assert torch.equal(found.logits, logits) and torch.equal(found.targets, targets)
    assert list(found.hidden) == [layer]
    torch.testing.assert_close(found.hidden[layer], torch.cat(alone), rtol=0, atol=1e-5)
    if layer == 3:
        torch.testing.assert_close(model.lm_head(found.hidden[layer]), logits, rtol=0, atol=1e-5)


def test_loss_covers_the_answer_and_its_end_token_and_nothing_else(tokenizer, questions):
    known = questions[questions.answer >= 0]
    for example, row in zip(batching.encode_questions(tokenizer, known), known.itertuples(), strict=True):
        predicted = example.input_ids[example.loss_start :]
        assert predicted[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(predicted[:-1]) == row.options[row.answer]
        given = tokenizer.decode(example.input_ids[: example.loss_start])
        assert row.question in given and row.context in given and given.endswith("assistant\n")


def test_loss_of_a_transfer_row_covers_the_question_text_and_nothing_else(tokenizer, questions):
    row = questions[questions.split == "transfer"]
    (example,) = batching.encode_questions(tokenizer, row)
    assert tokenizer.decode(example.input_ids[example.loss_start :]) == row.question.item()


def test_transfer_row_without_a_chat_template(make_tokenizer, questions):
    tokenizer, row = make_tokenizer(chat_template=None), questions[questions.split == "transfer"]
    (example,) = batching.encode_questions(tokenizer, row)
    assert tokenizer.decode(example.input_ids[example.loss_start :]).strip() == row.question.item()


# --- letters -------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("letter", list("ABCD"))
def test_a_letter_has_a_form_with_a_space_and_one_without(tokenizer, letter):
    forms = [tokenizer.decode(ids) for ids in batching.letter_forms(tokenizer, letter)]
    assert sorted(forms) == [f" {letter}", letter]


def test_letter_forms_hold_what_follows_the_chat_header_and_what_follows_answer(tokenizer):
    """The whole text, cut where the prompt's tokens end, gives one of the forms, whatever the prompt ends with."""
    for prompt in ("<|im_start|>assistant\n", "Answer:", "Answer: ", "[/INST]"):
        whole = tokenizer(prompt + "A", add_special_tokens=False).input_ids
        spaced = tokenizer(prompt + " A", add_special_tokens=False).input_ids
        assert [whole[-1]] in batching.letter_forms(tokenizer, "A")
        assert [spaced[-1]] in batching.letter_forms(tokenizer, "A")


def test_letter_forms_of_a_tokenizer_that_prepends_a_space(make_sentencepiece_like):
    tokenizer = make_sentencepiece_like(["A", "B", "▁A", "▁B"])
    assert tokenizer("A", add_special_tokens=False).input_ids == [tokenizer.convert_tokens_to_ids("▁A")]
    forms = batching.letter_forms(tokenizer, "A")
    assert sorted(tokenizer.convert_ids_to_tokens(ids)[0] for ids in forms) == ["A", "▁A"]


def test_a_letter_that_is_no_token_is_an_error(make_sentencepiece_like):
    with pytest.raises(ValueError, match="'C' is no token"):
        batching.letter_forms(make_sentencepiece_like(["A", "▁A"]), "C")


@pytest.mark.weights
def test_letter_forms_of_the_real_tokenizer():
    params = load_params(ROOT / "params" / "smoke.yaml")
    tokenizer = models.load_tokenizer(models.local_folder(params.models.teacher))
    for letter in prompts.LETTERS:
        forms = sorted(tokenizer.decode(ids) for ids in batching.letter_forms(tokenizer, letter))
        assert forms == [f" {letter}", letter]


# --- what is read once -----------------------------------------------------------------------------------------------

some_prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=12)


@given(prompts=some_prompts, least=st.integers(1, 12))
def test_groups_hold_each_prompt_once_with_a_start_that_all_share(prompts, least):
    groups = batching.group_by_prefix(prompts, least)
    assert sorted(itertools.chain(*(members for _, members in groups))) == list(range(len(prompts)))
    for length, members in groups:
        assert len({tuple(prompts[i][:length]) for i in members}) == 1
        assert all(length < len(prompts[i]) for i in members), "a token is left to be read"
        assert length == 0 or length * (len(members) - 1) >= least, "a group pays for itself"


def test_a_start_is_shared_by_as_many_as_have_it():
    system, exam, code = [1, 2, 3], [10, 11, 12, 13], [20, 21]
    prompts = [[*system, *kind, 100 + i] for i in range(20) for kind in (exam, code, [])]
    groups = {length: sorted(members) for length, members in batching.group_by_prefix(prompts, least_saved=30)}
    assert groups == {7: list(range(0, 60, 3)), 5: list(range(1, 60, 3)), 3: list(range(2, 60, 3))}
    groups = dict(batching.group_by_prefix(prompts, least_saved=60))
    assert {length: len(members) for length, members in groups.items()} == {7: 20, 3: 40}, "exam alone saves enough"


@pytest.mark.parametrize("prompts", [[], [[5]], [[5, 6], [7, 8]], [[5, 6, 7]] * 3, [[5], [5, 6], [5, 6, 7]]])
def test_where_nothing_is_saved_there_is_one_group(prompts):
    assert batching.group_by_prefix(prompts, least_saved=100) == ([(0, list(range(len(prompts))))] if prompts else [])


# --- measures ------------------------------------------------------------------------------------------------------


def test_each_example_is_predicted_once_and_as_if_alone(make_llama, make_examples):
    model, examples = make_llama(), make_examples(7)
    seen = []
    for rows, found in batching.iterate_predicted(model, examples, PAD, batch_tokens=60):
        alone = [batching.collect_logits(model, [examples[i]], PAD) for i in rows]
        torch.testing.assert_close(found.logits, torch.cat(alone), rtol=0, atol=1e-5)
        assert found.targets.tolist() == [t for i in rows for t in examples[i].input_ids[examples[i].loss_start :]]
        seen += rows
    assert sorted(seen) == list(range(7))


def test_collect_nll_equals_the_hand_calculation_and_ignores_dropout(make_llama, make_examples):
    model, examples = make_llama(attention_dropout=0.5).train(), make_examples(4)
    found = batching.collect_nll(model, examples, PAD)
    for example, nll in zip(examples, found, strict=True):
        with torch.no_grad():
            logprobs = model.eval()(torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
        by_hand = [
            -logprobs[i - 1, example.input_ids[i]].item() for i in range(example.loss_start, len(example.input_ids))
        ]
        assert nll == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-5)


def test_drift_is_zero_iff_the_logits_are_equal():
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    assert batching.measure_drift(logits, logits.clone()) == {
        "positions": 5, "kl_nats": 0.0, "max_abs_logit": 0.0, "top1_changed": 0.0
    }  # fmt: skip
    moved = logits.clone()
    moved[2, logits[2].argmin()] = logits[2].max() + 1
    drift = batching.measure_drift(logits, moved)
    assert drift["top1_changed"] == pytest.approx(1 / 5)
    assert drift["kl_nats"] > 0
    assert drift["max_abs_logit"] == pytest.approx((logits[2].max() + 1 - logits[2].min()).item())


def test_drift_of_two_coins():
    fair, biased = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    expected = 0.5 * torch.log(torch.tensor(0.5 / 0.75)) + 0.5 * torch.log(torch.tensor(0.5 / 0.25))
    assert batching.measure_drift(fair, biased)["kl_nats"] == pytest.approx(expected.item(), abs=1e-6)
