"""Instruction samples as question rows: one row for each response of a conversation.

A row asks for one response: `question` is the user's turn before it, `context` holds the turns before that as JSON, and
the response is the only option. So the loss covers every response and nothing else; a batch reads shared turns once.
"""

import json
from collections.abc import Iterator

import pandas as pd

from medkit.data.raw_questions import clean_text
from medkit.prompts.templates import INSTRUCTION

ROLES = ("system", "user", "assistant")


def make_instructions(messages, pool: str | None, group: str | None, row: int) -> Iterator[dict]:
    """The records of a conversation, a list of {role, content}; one with the `fault` if it cannot be used.

    `row` is the number of its row in the file. `prompts`, by which near-duplicates are searched, is what the user says
    in the whole conversation, so its records are in one group. If the user speaks last, the answer of the last record
    is not known (−1).
    """
    record = {"question": "", "context": "", "options": [], "answer": -1, "subject": "", "kind": INSTRUCTION}
    record |= {"pool": pool, "row": row} | ({"group": group} if group else {})
    try:
        turns = _read_turns(messages)
    except ValueError as fault:
        yield record | {"question": str(messages), "fault": str(fault)}
        return
    prompts = " ".join(turn["content"] for turn in turns if turn["role"] == "user")
    for place, turn in enumerate(turns):
        if turn["role"] == "user":
            responses = [after["content"] for after in turns[place + 1 : place + 2]]
            context = json.dumps(turns[:place], ensure_ascii=False) if place else ""
            record |= {"question": turn["content"], "context": context, "prompts": prompts}
            yield record | {"options": responses, "answer": len(responses) - 1}


def _read_turns(messages) -> list[dict]:
    """The turns of a conversation, cleaned. Raises ValueError, which says in a few words why it cannot be used."""
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise ValueError("messages are not a list of {role, content}")
    roles = [turn.get("role") for turn in messages]
    if unknown := [role for role in roles if role not in ROLES]:
        role = str(unknown[0])[:20]
        raise ValueError(f"the role {role!r} is none of {', '.join(ROLES)}: rename it, or leave the turn out")
    if not all(isinstance(turn.get("content"), str) for turn in messages):
        raise ValueError("a turn's content is not text")
    turns = [{"role": turn["role"], "content": clean_text(turn["content"], lines=True)} for turn in messages]
    if not all(turn["content"] for turn in turns):
        raise ValueError("an empty turn")
    spoken = roles[roles[:1] == ["system"] :]
    if not spoken or any(role != ROLES[1 + place % 2] for place, role in enumerate(spoken)):
        raise ValueError("the turns are not user, assistant, user, … after at most one system turn")
    return turns


def prompt_texts(questions: pd.DataFrame) -> pd.Series:
    """Question and context of each row as one text; of an instruction the user's turns: many share a system turn."""
    contexts = [
        " ".join(turn["content"] for turn in json.loads(context or "[]") if turn["role"] == "user")
        if kind == INSTRUCTION
        else context
        for kind, context in zip(questions.kind, questions.context, strict=True)
    ]
    return questions.question + " " + pd.Series(contexts, questions.index, dtype=object)
