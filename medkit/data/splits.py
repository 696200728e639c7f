"""Source records → one questions table, split so that near-duplicates never stand on both sides.

`readers` turn files into records and `records.refusal` judges them: what is no question is rejected with a reason,
counted, and shown by one example. `assign_pools` decides by group, not by row, where a question may go; `take_splits`
draws the numbers the params ask for. Nothing here knows a model: token counting comes in as a function.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from medkit.data import icd10_questions, readers
from medkit.data.near_duplicates import group_near_duplicates, grouping_texts
from medkit.data.readers import DataError
from medkit.data.records import refusal, rejected_table
from medkit.params import SPLITS, DatasetParams, digest

COLUMNS = ["id", "source", "split", "group", "kind", "question", "context", "options", "answer", "subject"]
POOL_SHARES = {"test": 0.35, "valid": 0.05, "train": 0.60}  # of the groups of a source that has no official split


def load_questions(
    datasets: dict[str, DatasetParams], paths: dict[str, Path], seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All questions the params ask for, before splitting, and what was rejected (source, reason, count, example).

    Raises DataError for a dataset without a reader and for one of which nothing is left.
    """
    frames, refused = [], []
    for name, dataset in datasets.items():
        kept = []
        for record in _records(name, dataset, paths[name], seed):
            reason = refusal(record)
            if reason:
                refused.append((name, reason, record["question"]))
            else:
                kept.append({"group": None, **record, "source": name})
        if not kept:
            reasons = dict(Counter(reason for source, reason, _ in refused if source == name))
            raise DataError(f"{name}: no usable question in {paths[name]}; rejected: {reasons}")
        frames.append(pd.DataFrame(kept))
    questions = pd.concat(frames, ignore_index=True)
    questions["id"] = [
        f"{s}-{digest([q, c, list(o)])[:10]}"
        for s, q, c, o in questions[["source", "question", "context", "options"]].itertuples(index=False)
    ]
    twice = questions.duplicated("id")
    again = questions.loc[twice, ["source", "question"]].itertuples(index=False)
    refused.extend((source, "the same question again", question) for source, question in again)
    return questions[~twice].reset_index(drop=True), rejected_table(refused)


def _records(name: str, dataset: DatasetParams, path: Path, seed: int) -> Iterator[dict]:
    if dataset.origin.kind == "table":
        return readers.read_table(path, dataset.origin)
    if name in icd10_questions.ICD_KINDS:
        concepts = icd10_questions.read_icd_concepts(path)
        wanted = {split: getattr(dataset, split) for split in POOL_SHARES}
        # a fifth more than the fullest pool needs, since pools are drawn by group and come out uneven
        count = -1 if "all" in wanted.values() else 40 + max(int(1.2 * n / POOL_SHARES[s]) for s, n in wanted.items())
        return icd10_questions.make_icd_questions(concepts, name, count, seed)
    if name not in readers.READERS:
        known = sorted([*readers.READERS, *icd10_questions.ICD_KINDS])
        raise DataError(f"{name}: no reader for this dataset; known: {known}; your own file is of kind `table`")
    return (
        readers.read_hub(name, path, dataset.origin.subset)
        if dataset.origin.kind == "hub"
        else readers.READERS[name](path)
    )


def assign_pools(questions: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Give every question a group and the pool (train, valid, test or transfer) its whole group belongs to.

    A group with an official test question is a test group: members with another official place are dropped, the rest
    may be tested too. A group with other official members is learned from. Groups without an official place go to a
    pool by a seeded hash of their name, alike in every source. Returns the table with `group` and `pool`, rows that
    would leak removed.
    """
    questions = questions.copy()
    free = questions.group.isna()
    text = grouping_texts(questions[free])
    # the official place of a group is found by its members, so groups are numbered over all sources together
    # and named by a member, so that a question's place does not depend on which other sources are there
    questions.loc[free, "group"] = "text:" + questions.id[free].groupby(group_near_duplicates(text)).transform("min")
    official = questions.pool.where(questions.pool.notna(), "")
    tested, placed = set(questions.group[official == "test"]), set(questions.group[official != ""])
    bounds = np.cumsum([POOL_SHARES[pool] for pool in ("test", "valid")])

    def pool_of(group: str, own: str) -> str:
        if group in tested:
            return "test" if own in ("test", "") else "leak"
        if own or group in placed:
            return own or "train"
        share = int(hashlib.sha256(f"{seed}:{group}".encode()).hexdigest()[:8], 16) / 16**8
        return ("test", "valid", "train")[int(np.searchsorted(bounds, share, side="right"))]

    questions["pool"] = [pool_of(group, own) for group, own in zip(questions.group, official, strict=True)]
    return questions[questions.pool != "leak"].reset_index(drop=True)


def take_splits(questions: pd.DataFrame, datasets: dict[str, DatasetParams], seed: int) -> pd.DataFrame:
    """Draw each dataset's number of questions per split from its pools; returns the final table (COLUMNS).

    Where a source has no `valid` pool, its `train` pool lends whole groups. Raises DataError when a pool is too small.
    """
    taken = []
    for name, dataset in datasets.items():
        rows = questions[questions.source == name].sample(frac=1, random_state=seed)
        train = rows[rows.pool == "train"]
        if dataset.valid != "all" and not (rows.pool == "valid").any():
            lent = train.group.isin(train.group.tail(dataset.valid))
            rows.loc[train.index[lent], "pool"] = "valid"
        for split in SPLITS:
            wanted, pool = getattr(dataset, split), rows[rows.pool == split]
            if wanted != "all" and wanted > len(pool):
                raise DataError(
                    f"{name}: {wanted} questions asked for {split}, {len(pool)} are there; "
                    f"lower data.datasets.{name}.{split} or write `all`"
                )
            taken.append((pool if wanted == "all" else pool.head(wanted)).assign(split=split))
    table = pd.concat(taken)[COLUMNS].sort_values(["source", "split", "id"], ignore_index=True)
    shared = table.groupby("group").split.agg(lambda s: {"test"} < set(s))
    if shared.any():
        raise DataError(f"groups {list(shared.index[shared])[:3]} stand in test and in another split")
    return table


def training_rows(questions: pd.DataFrame, split: str) -> pd.DataFrame:
    """The rows of a split that may be learned from. Raises DataError for `test`, and for a split that is empty."""
    if split == "test":
        raise DataError("split 'test' is for notebooks 05 and 06 alone; train on 'train', choose on 'valid'")
    rows = questions[questions.split == split]
    if rows.empty:
        raise DataError(f"split {split!r} is empty; raise data.datasets.*.{split} in the params")
    return rows.reset_index(drop=True)


def drop_long(questions: pd.DataFrame, count_tokens: Callable[[dict], int], max_prompt_tokens: int) -> pd.DataFrame:
    """Questions whose prompt fits; raises DataError if a (source, split) loses all of its rows."""
    lengths = np.array([count_tokens(row) for row in questions.to_dict("records")])
    kept = questions.assign(prompt_tokens=lengths)[lengths <= max_prompt_tokens]
    lost = set(questions.groupby(["source", "split"]).groups) - set(kept.groupby(["source", "split"]).groups)
    if lost:
        raise DataError(
            f"{sorted(lost)}: every prompt is longer than data.max_prompt_tokens={max_prompt_tokens}; raise it"
        )
    return kept.reset_index(drop=True)
