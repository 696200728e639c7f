"""What of an instruction is learned: every response with its end token, once, and nothing else."""

import pandas as pd
from toys import CHATML

from medkit.data import splits
from medkit.data.instructions import make_instructions
from medkit.data.raw_questions import rejection_reason
from medkit.modeling import batches
from medkit.prompts import templates

SYSTEM = {"role": "system", "content": "You are a nurse."}


def say(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


def to_rows(*chats: list[dict], pool=None) -> pd.DataFrame:
    records = [record for chat in chats for record in make_instructions(chat, pool, None, 1)]
    assert not any(map(rejection_reason, records))
    return pd.DataFrame(records)


def test_the_loss_covers_every_response_and_nothing_else(tokenizer):
    """As transformers' mask of the assistant's tokens, from a template with generation marks."""
    marked = CHATML.replace(
        "{{ message['content'] }}<|im_end|>\n",
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\\n' }}",
    )
    assert marked != CHATML
    chats = [
        say("What is gout?", "Crystals in a joint."),
        say("Hi", "Hello.", "My toe hurts.", "Steps:\n\n1. Rest\n    - no work", "Thanks", "Get well."),
        [SYSTEM, *say("Is 37 °C a fever?", "No.", "And 39?", "Yes.")],
    ]
    examples = iter(batches.encode_questions(tokenizer, to_rows(*chats)))
    for chat in chats:
        turns = chat if chat[0] == SYSTEM else [{"role": "system", "content": templates.SYSTEM}, *chat]
        options = {"chat_template": marked, "return_dict": True, "return_assistant_tokens_mask": True}
        whole = tokenizer.apply_chat_template(turns, **options)
        predicted = []
        for _ in range(len(turns) // 2):
            example = next(examples)
            assert whole["input_ids"][: len(example.input_ids)] == example.input_ids
            predicted += range(example.loss_start, len(example.input_ids))
        assert predicted == [place for place, is_response in enumerate(whole["assistant_masks"]) if is_response]
    assert next(examples, None) is None


def test_a_response_counts_as_length_and_a_last_turn_without_one_is_read_alone(tokenizer):
    rows = to_rows(say("a", "b"), say("c", "word " * 200)).assign(source="notes", split="private")

    def count(row: dict) -> int:
        return templates.count_prompt_tokens([tokenizer], row)

    kept = splits.drop_long(rows, count, 150)
    (example,) = batches.encode_questions(tokenizer, kept)
    assert kept.question.tolist() == ["a"] and kept.prompt_tokens.tolist() == [len(example.input_ids)]
    asked = to_rows(say("first", "b", "last turn"), pool="transfer")
    (answered,) = batches.encode_questions(tokenizer, asked.head(1))
    assert count(asked.to_dict("records")[1]) > len(answered.input_ids)
