"""A thought is closed within its budget, and thought and answer are counted and kept apart."""

import pytest
from toys import THINKING, Scripted

from medkit.modeling.engine import write
from medkit.prompts import templates
from medkit.stage import MedkitError

MESSAGES = [{"role": "user", "content": "Which one?"}]


def test_a_thought_is_closed_where_its_budget_ends(thinker):
    thoughts = ["It is C.\n</think> B", "A, or rather A, or rather A, or rather A", "I stop.<|im_end|>"]
    engine = Scripted(thinker, thoughts, ["\n\nC<|im_end|>", "A<|im_end|>", "B<|im_end|>"])
    prompt = templates.encode(thinker, MESSAGES, thought="")[0]
    own, cut, stopped = write(engine, thinker, [prompt] * 3, 5, max_thinking_tokens=20)
    assert (own.thought, own.answer, own.finished) == ("It is C.", "\n\nC", True)
    assert own.thinking_tokens == len(thinker("It is C.\n</think>", add_special_tokens=False).input_ids)
    assert own.answer_tokens == len(thinker("\n\nC<|im_end|>", add_special_tokens=False).input_ids)
    closing = thinker("\n</think>\n\n", add_special_tokens=False).input_ids
    assert cut.thinking_tokens == 20 + len(closing) and cut.answer == "A" and not cut.finished
    assert list(engine.asked[4].prompt_ids[-len(closing) :]) == closing
    assert stopped.thought == "I stop." and stopped.answer == "B" and not stopped.finished
    trained = templates.encode(thinker, MESSAGES, "B", thought="I stop.")
    assert [*engine.asked[5].prompt_ids] == [*trained[0], *trained[1][:-2]], "as it is read in training"


def test_without_a_budget_or_a_model_that_thinks_nothing_is_thought(thinker, tokenizer):
    for reader, budget in ((thinker, None), (tokenizer, None), (tokenizer, 20)):
        engine = Scripted(reader, ["C<|im_end|>"])
        (written,) = write(engine, reader, [templates.encode(reader, MESSAGES)[0]], 5, budget)
        assert (written.thought, written.answer, written.thinking_tokens, written.finished) == ("", "C", 0, True)


def test_a_mark_of_several_tokens_cannot_be_stopped_at(make_tokenizer):
    tokenizer = make_tokenizer(chat_template=THINKING)
    with pytest.raises(MedkitError, match=r"'</think>' is \d+ tokens of this tokenizer.*max_thinking_tokens to null"):
        write(Scripted(tokenizer), tokenizer, [[1]], 5, max_thinking_tokens=20)
