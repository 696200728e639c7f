"""How a model thinks is read from its chat template; a plain answer follows an empty thought in the family's form."""

import pytest

from medkit.prompts.templates import encode, thinking_of

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OPENED = "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"  # as in DeepSeek-R1-Distill
EMPTY = "{{ '<think>\\n\\n</think>\\n\\n' }}"
SWITCH = f"{{% if enable_thinking is defined and enable_thinking is false %}}{EMPTY}{{% endif %}}"  # as in Qwen3
BOTH = f"{{% if enable_thinking is defined and not enable_thinking %}}{EMPTY}{{% else %}}{OPENED}{{% endif %}}"
MESSAGES = [{"role": "user", "content": "Which one? </think>"}]


# without an end a template may drop the thoughts of earlier turns all the same; with EMPTY they are closed already
THINKS = {OPENED: True, SWITCH: True, BOTH: True, "": False, EMPTY: False, "{{ '[THINK]' }}": True}


@pytest.mark.parametrize(("end", "thinks"), THINKS.items())
def test_a_plain_answer_follows_an_empty_thought_and_a_generated_one_an_open_thought(make_tokenizer, end, thinks):
    tokenizer = make_tokenizer(chat_template=TURNS + ASK + end)
    assert bool(thinking_of(tokenizer).opening) == thinks
    opening, closing = ("[THINK]", "\n[/THINK]\n\n") if "[" in end else ("<think>\n", "\n</think>\n\n")
    closed, answer_ids = encode(tokenizer, MESSAGES, "C")
    opened, thought_ids = encode(tokenizer, MESSAGES, "C", thought="It is A.")
    assert encode(tokenizer, MESSAGES)[0] == closed
    assert encode(tokenizer, MESSAGES, thought="")[0] == opened
    closed, answer, opened, thought = map(tokenizer.decode, (closed, answer_ids, opened, thought_ids))
    assert answer == "C<|im_end|>"
    if not thinks:
        assert (closed, thought) == (opened, "It is A.\n\nC<|im_end|>")
    else:
        assert closed.endswith(f"assistant\n{opening}{closing}")
        assert opened.endswith(f"assistant\n{opening}")
        assert thought == f"It is A.{closing}C<|im_end|>"


@pytest.mark.parametrize("end", [OPENED, SWITCH], ids=["open", "closed"])
def test_marks_in_a_text_stay_text_though_they_are_no_special_tokens(make_tokenizer, end):
    """R1-Distill has `<think>` and `</think>` as added tokens that are not special, Qwen3 too."""
    tokenizer = make_tokenizer(chat_template=TURNS + ASK + end)
    marks = [tokenizer.add_tokens([mark]) and tokenizer.convert_tokens_to_ids(mark) for mark in ("<think>", "</think>")]
    harmless = encode(tokenizer, [MESSAGES[0] | {"content": "Which one?"}], "C", thought="It is A.")
    given, taught = encode(tokenizer, MESSAGES, "C </think> B", thought="It is </think> A <think>.")
    counted = [[ids.count(mark) for mark in marks] for ids in (given, taught, *harmless)]
    assert counted[:2] == counted[2:]
    assert tokenizer.decode(taught) == "It is </think> A <think>.\n</think>\n\nC </think> B<|im_end|>"
