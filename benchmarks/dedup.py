"""Near-duplicate groups and contamination on 200,000 rows made from MedMCQA, whose true origins are known.

Every row is an edited copy of one of the real MedMCQA validation questions, with a few copies of real test questions
planted among them. Measured in a fresh process each time: seconds and peak memory. Counted: which edits the groups
and the rules still see through, and what they join that was never one question.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from record import RESULTS, Ratio, versions, write

from medkit import sources
from medkit.data import contamination, near_duplicates, splits
from medkit.params import load_params
from medkit.stage import ROOT

TESTED = ("medqa", "pubmedqa", "mmlu")
SECONDS_GOAL, GIGABYTES_GOAL = 300.0, 4.0

Words = list[str]


def change_words(words: Words, count: int, vocabulary: np.ndarray, rng: np.random.Generator) -> Words:
    """Drop, replace, or swap with its neighbour: `count` words at random places."""
    words = list(words)
    for _ in range(count):
        place, how = int(rng.integers(len(words))), rng.integers(3)
        if how == 0 and len(words) > 3:
            del words[place]
        elif how == 1 and place + 1 < len(words):
            words[place : place + 2] = words[place + 1], words[place]
        else:
            words[place] = str(rng.choice(vocabulary))
    return words


def change_numbers(words: Words, vocabulary: np.ndarray, rng: np.random.Generator) -> Words:
    """Every number another one; a question without numbers gets another longest word, most often a drug or disease."""
    if any(word.isdigit() for word in words):
        return [str(rng.integers(100)) if word.isdigit() else word for word in words]
    longest = max(range(len(words)), key=lambda place: len(words[place]))
    return [str(rng.choice(vocabulary)) if place == longest else word for place, word in enumerate(words)]


def change_wording(words: Words, rng: np.random.Generator) -> Words:
    """The examiner's phrases said otherwise, and a lead in front."""
    text = " ".join(words).lower()
    for phrase, other in (
        ("which of the following", "which one of these"), ("all of the following", "all these"),
        ("most common", "commonest"), ("is seen in", "occurs in"), ("true about", "right for"),
    ):  # fmt: skip
        text = text.replace(phrase, other)
    return [f"Q{rng.integers(1000)}", *text.split()]


def edits(vocabulary: np.ndarray) -> dict[str, Callable[[Words, np.random.Generator], Words]]:
    """Name of an edit → words of a question and a generator → other words."""
    return {
        "case and punctuation": lambda words, rng: [word.upper() + "," for word in words],
        "1 word": lambda words, rng: change_words(words, 1, vocabulary, rng),
        "2 words": lambda words, rng: change_words(words, 2, vocabulary, rng),
        "4 words": lambda words, rng: change_words(words, 4, vocabulary, rng),
        "numbers and names": lambda words, rng: change_numbers(words, vocabulary, rng),
        "wording": change_wording,
        "another ending": lambda words, rng: [
            *words[: len(words) - len(words) // 3],
            *map(str, rng.choice(vocabulary, len(words) // 3)),
        ],
        "options in another order": lambda words, rng: words,
    }


def edited_copies(questions: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """`count` copies, as equal a number of each question as can be; the first of each untouched. Adds origin, edit."""
    rng = np.random.default_rng(seed)
    split = [question.split() for question in questions.question]
    known = edits(np.unique([word for words in split for word in words]))
    names, rows = list(known), []
    for number in range(count):
        turn, place = divmod(number, len(questions))
        row = questions.iloc[place]
        edit = names[(turn - 1 + place) % len(names)] if turn else "none"
        words = known[edit](split[place], rng) if turn else split[place]
        options = list(row.options)
        if edit == "options in another order":
            rng.shuffle(options)
        rows.append((f"{row.id}-{turn}", place, edit, " ".join(words), row.context, options, row.kind))
    return pd.DataFrame(rows, columns=["id", "origin", "edit", "question", "context", "options", "kind"])


def make_table(rows: int, seed: int) -> pd.DataFrame:
    """Copies of MedMCQA and one edited copy of each test question to learn from; the real test questions to test."""
    params = load_params(ROOT / "params" / "tiny.yaml", {})
    chosen = {name: params.data.datasets[name] for name in ("medmcqa", *TESTED)}
    paths = {name: sources.fetch(dataset.origin) for name, dataset in chosen.items()}
    questions, _ = splits.load_questions(chosen, paths, params.seed)
    test = questions[questions.source.isin(TESTED)].reset_index(drop=True)
    planted = edited_copies(test, 2 * len(test), seed)
    planted = planted[planted.edit != "none"].assign(source="planted", split="labelled")
    real = questions[(questions.source == "medmcqa") & (questions.pool != "transfer")].reset_index(drop=True)
    copies = edited_copies(real, rows - len(planted), seed + 1).assign(source="medmcqa", split="labelled")
    test = test.assign(origin=np.arange(len(test)), edit="none", split="test")
    return pd.concat([copies, planted, test])[[*copies.columns]].reset_index(drop=True)


def peak_bytes() -> int:
    """Most memory this process has held; not ru_maxrss, which a child inherits from the process that started it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def measure(folder: Path) -> None:
    """In a process of its own: group the rows to learn from, find what is contaminated, leave both in the folder."""
    questions = pd.read_parquet(folder / "questions.parquet")
    loaded, start = peak_bytes(), time.perf_counter()
    learned = questions[questions.split == "labelled"]
    groups = near_duplicates.group_near_duplicates(near_duplicates.grouping_texts(learned))
    middle = time.perf_counter()
    pairs = contamination.find_contamination(questions)
    end = time.perf_counter()
    pd.DataFrame({"id": learned.id, "group": groups}).to_parquet(folder / "groups.parquet")
    pairs.to_parquet(folder / "pairs.parquet")
    print(json.dumps({
        "grouping_seconds": middle - start, "contamination_seconds": end - middle, "seconds": end - start,
        "peak_bytes": peak_bytes(), "peak_bytes_before": loaded,
    }))  # fmt: skip


def judge_groups(questions: pd.DataFrame, groups: pd.Series) -> dict:
    """Recall by edit: is a copy in its original's group? And the groups that join what was never one question."""
    copies = questions[questions.source == "medmcqa"].assign(group=groups)
    originals = copies[copies.edit == "none"].set_index("origin")
    copies["found"] = copies.group == copies.origin.map(originals.group)
    # real questions that are near-duplicates of each other already are no mistake
    one_question = dict(
        zip(
            originals.index,
            near_duplicates.group_near_duplicates(near_duplicates.grouping_texts(originals)),
            strict=True,
        )
    )
    true = copies.origin.map(one_question)
    strangers = true.groupby(copies.group).transform("nunique") > 1
    sizes = copies.groupby("group").size()
    return {
        "recall_by_edit": copies[copies.edit != "none"].groupby("edit").found.mean().to_dict(),
        "recall": copies.found[copies.edit != "none"].mean(),
        "groups": len(sizes), "largest_group": int(sizes.max()),
        "groups_of_several_origins": int((true.groupby(copies.group).nunique() > 1).sum()),
        "share_of_rows_in_them": strangers.mean(),
    }  # fmt: skip


def judge_pairs(questions: pd.DataFrame, pairs: pd.DataFrame) -> dict:
    """Recall by edit and rule of the planted copies, and the pairs that nobody planted."""
    origin = questions.set_index("id").origin
    planted = pairs[pairs.source_train == "planted"]
    right = planted[origin[planted.id_test].to_numpy() == origin[planted.id_train].to_numpy()]
    copies = questions[questions.source == "planted"]
    found = {rule: copies.id.isin(right.id_train[right.rule == rule]) for rule in right.rule.unique()}
    found["any"] = copies.id.isin(right.id_train)
    by_edit = pd.DataFrame(found).groupby(copies.edit).mean()
    return {
        "recall_by_edit": by_edit.to_dict("index"),
        "recall": found["any"].mean(),
        "pairs_not_planted": (len(pairs) - len(right)),
        "of_them_from_medmcqa": pairs[pairs.source_train == "medmcqa"].rule.value_counts().to_dict(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000, help="fewer than 200,000: a smoke run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure)

    with TemporaryDirectory() as name:
        folder = Path(name)
        questions = make_table(args.rows, seed=0)
        questions.to_parquet(folder / "questions.parquet")
        command, runs, load = [sys.executable, __file__, "--measure", name], [], []
        for _ in range(args.repeats):
            load.append(os.getloadavg()[0])
            runs.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        groups, pairs = pd.read_parquet(folder / "groups.parquet"), pd.read_parquet(folder / "pairs.parquet")
    grouping = judge_groups(questions, groups.group)
    found = judge_pairs(questions, pairs)
    seconds, peak = (float(np.median([run[key] for run in runs])) for key in ("seconds", "peak_bytes"))
    setup = {
        "rows": args.rows, "test_rows": int((questions.split == "test").sum()),
        "made_from": int(questions.origin[questions.source == "medmcqa"].nunique()),
        "median_words": float(near_duplicates.grouping_texts(questions).str.split().str.len().median()),
        "statistic": "median of runs in fresh processes; peak memory is VmHWM, libraries and table included",
        "cores": len(os.sched_getaffinity(0)), "load_average_before": load,
        "versions": versions("numpy", "pandas", "scipy", "rapidfuzz"),
    }  # fmt: skip
    prefix = f"dedup_{args.rows // 1000}k"
    ratios = {
        f"{prefix}_seconds": Ratio(seconds, SECONDS_GOAL, "lower", args.repeats),
        f"{prefix}_peak_gb": Ratio(peak / 1e9, GIGABYTES_GOAL, "lower", args.repeats),
        "group_recall": Ratio(grouping["recall"], None, "higher", 1),
        "planted_copies_found": Ratio(found["recall"], None, "higher", 1),
    }
    raw = {"runs": runs, "grouping": grouping, "contamination": found}
    path = write("dedup" if args.rows == 200_000 else f"dedup-{args.rows}-rows", setup, ratios, raw, args.output)
    print(path.read_text())


if __name__ == "__main__":
    main()
