"""Instruction samples: every response is learned once and nothing else; what cannot be used is said in a sentence."""

import json

import numpy as np
import pandas as pd
import pytest

from medkit import sources
from medkit.data import contamination, splits
from medkit.data.instructions import prompt_texts
from medkit.params import SPLITS, DatasetParams, Instructions


def say(*contents: str, roles=("user", "assistant")) -> list[dict]:
    """Messages of these contents, the roles in turn."""
    return [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]


def system(content: str) -> dict:
    return {"role": "system", "content": content}


LONG = "Steps:\n\n1. Rest\n    - no work\n2. Drink\n"
CHATS = [
    say("What is gout?", "Crystals in a joint."),
    say("Hi", "Hello. What is it?", "My toe hurts at night.", LONG, "Thanks", "Get well."),
    [system("You are a nurse."), *say("Is 37 °C a fever?", "No.")],
]


def load(path, columns=None, pool=None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`load_questions` of one source."""
    origin = {"kind": "instructions", "path": str(path), "pool": pool, "columns": columns or {"messages": "chat"}}
    notes = DatasetParams(origin=Instructions(**origin), **dict.fromkeys(SPLITS, 0))
    return splits.load_questions({"notes": notes}, {"notes": path}, seed=0)


@pytest.fixture
def write(tmp_path):
    """write(chats, ending): a file with a chat in each row."""

    def write(chats, ending="jsonl"):
        path, table = tmp_path / f"mine.{ending}", pd.DataFrame({"chat": chats, "patient": range(len(chats))})
        if ending == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in table.to_dict("records")))
        elif ending == "parquet":
            table.to_parquet(path)
        else:
            table.assign(chat=table.chat.map(json.dumps)).to_csv(path, index=False)
        return path

    return write


def test_every_file_and_a_dataset_folder_hold_the_same_samples(write, tmp_path, monkeypatch):
    table, *others = (load(write(CHATS, ending))[0] for ending in ("jsonl", "parquet", "csv"))
    for other in others:
        pd.testing.assert_frame_equal(other, table)
    turns = [turn for chat in CHATS for turn in chat if turn["role"] == "assistant"]
    assert table.options.tolist() == [[turn["content"].strip()] for turn in turns]
    assert set(table.kind) == {"instruction"} and set(table.answer) == {0} and table.id.is_unique
    pairs = [{"q": "Is 37 °C", "more": "a fever?", "a": "No.", "as": "You are a nurse."}]
    pairs += [{"q": "What is gout?", "more": "", "a": "Crystals in a joint.", "as": ""}]
    monkeypatch.setenv("MEDKIT_CACHE", str(tmp_path / "cache"))
    for name, row in zip(("test", "train"), pairs, strict=True):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / f"{name}.jsonl").write_text(json.dumps(row))
    columns = {"prompt": ["q", "more"], "response": "a", "system": "as", "split": "split"}
    found, _ = load(tmp_path / "folder", columns)
    assert found.pool.tolist() == ["test", "train"]
    assert found.id[1] == table.id[0] and found.id[0] not in set(table.id)  # it is of the content, wherever that is
    assert found.question[0] == "Is 37 °C\n\na fever?" and found.context[0] == table.context[4]


def test_a_dataset_of_the_hub_is_read_by_its_columns_and_splits(tmp_path, monkeypatch):
    """From the hub's own cache, without a network: the branch is resolved, and the subset has splits of its own."""
    monkeypatch.setenv("MEDKIT_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    place, commit = tmp_path / "hub" / "datasets--owner--chats", "c" * 40
    snapshot, branch, parts = place / "snapshots" / commit, place / "refs" / "main", ("train", "validation", "test")
    files = "".join(f"  - split: {part}\n    path: visits/{part}.parquet\n" for part in parts)
    for path in (snapshot / "visits" / "test.parquet", snapshot / "other" / "train.parquet", branch):
        path.parent.mkdir(parents=True, exist_ok=True)
    (snapshot / "README.md").write_text(f"---\nconfigs:\n- config_name: visits\n  data_files:\n{files}---\n")
    pd.DataFrame({"other": [1]}).to_parquet(snapshot / "other" / "train.parquet")
    for part, chat in zip(parts, CHATS, strict=True):
        pd.DataFrame({"conversation": [chat], "case": ["c1"]}).to_parquet(snapshot / "visits" / f"{part}.parquet")
    branch.write_text(commit)
    hub = {"kind": "hub", "repo": "owner/chats", "revision": "main", "type": "dataset", "subset": "visits"}
    columns = {"messages": "conversation", "group": "case", "split": "split"}
    origin = Instructions(kind="instructions", path=hub, pool=None, columns=columns)
    assert sources.is_here(origin) and sources.fetch(origin) == snapshot
    notes = DatasetParams(origin=origin, **dict.fromkeys(SPLITS, 0))
    table, rejected = splits.load_questions({"notes": notes}, {"notes": snapshot}, seed=0)
    assert rejected.empty and set(table.group) == {"table:c1"} and set(table.kind) == {"instruction"}
    turns = {turn["content"].strip() for chat in CHATS for turn in chat if turn["role"] == "assistant"}
    assert {options[0] for options in table.options} == turns
    assert dict(zip(table.question, table.pool, strict=True)).items() >= {
        "What is gout?": "train", "Thanks": "valid", "Is 37 °C a fever?": "test"
    }.items()  # fmt: skip


FAULTS = {
    "messages are not a list": [{"role": "user"}, "hello", ["hello"], None],
    "the role 'tool' is none of system, user, assistant": [[*say("a", "b"), {"role": "tool", "content": "c"}]],
    "the role 'None' is none": [[{"from": "human", "value": "a"}]],
    "a turn's content is not text": [say("a", [{"type": "text", "text": "b"}]), say("a", None)],
    "an empty turn": [say("a", ""), say("a", " \n\u200b"), say("", "b")],
    "the turns are not user, assistant, user, …": [
        [], say("a", "b", roles=("assistant", "user")), say("a", "b", roles=("user", "user")), [system("a")],
        [*say("a", "b"), system("c")],
    ],
    "no response to the user's last turn": [say("a"), [system("a"), *say("b")]],
    "broken characters": [say("a", "\ud800"), say("a", "b", "\udfff", "c")],
}  # fmt: skip


@pytest.mark.parametrize("said", FAULTS)
@pytest.mark.filterwarnings("ignore:notes")  # most rows are rejected
def test_what_cannot_be_used_is_said_in_one_sentence(write, said):
    rows = [CHATS[0], *FAULTS[said]]
    table, rejected = load(write(rows))
    assert len(table) == 1 and len(rejected) == 1
    (line,) = rejected.itertuples()
    assert said in line.reason
    assert {int(row) for row in line.rows.split(", ")} == set(range(2, len(rows) + 1))


def test_a_chat_that_ends_with_the_user_keeps_its_responses(write):
    table, rejected = load(write([say("a first turn", "b", "the last turn")]))
    assert table.options.tolist() == [["b"]] and rejected["count"].tolist() == [1]


WORDS = "the knee has been swollen and warm for nine days after a long walk in the hills"


def test_a_conversation_and_its_near_duplicates_stand_on_one_side(write):
    """The prompts decide, not responses or a system turn that all share."""
    shared = system("You are a careful assistant of a clinic. " * 8)
    chats = [[shared, *say("Hi", "Hello", f"{WORDS} {n}", "Rest. " * n)] for n in (1, 30)]
    others, response = (" ".join(f"w{n}x{i}" for i in range(12)) for n in range(40)), "The same long response. " * 9
    chats += [[shared, *say(other, response)] for other in others]
    table = splits.assign_pools(load(write(chats))[0], seed=0)
    knee = table[table.question.str.contains("knee|Hi$")]
    assert knee.group.nunique() == 1 and len(knee) == 3  # one greeting is the same row
    assert table.group.nunique() == 41 and table.pool.nunique() > 1
    declared = splits.assign_pools(load(write(chats), {"messages": "chat", "group": "patient"})[0], seed=0)
    assert declared.groupby("group").pool.nunique().max() == 1 and declared.group.nunique() == 41  # joined


def test_contamination_reads_what_the_user_said_in_the_whole_chat(write):
    shared = system("You are a careful assistant of a clinic who answers in short plain words. " * 4)
    chats = [say(WORDS, "Rest.", "And then?", "Ice."), say("Hm.", "Yes?", f"Well: {WORDS}!", "Walk."), CHATS[0]]
    table, _ = load(write([[shared, *chat] for chat in chats]))
    table["split"] = ["test", "test", "private", "private", "private"]
    found = contamination.find_contamination(table, np.eye(len(table)))
    assert {*found.id_test} == {*table.id[:2]} and set(found.id_train) == {table.id[3]}
    assert not prompt_texts(table).str.contains("clinic|Rest").any()
