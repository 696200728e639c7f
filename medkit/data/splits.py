"""One table of questions, split so that near-duplicates never stand on both sides: read, give pools, draw splits."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd

from medkit.data import consultations, icd10_questions, readers
from medkit.data.near_duplicates import group_near_duplicates, grouping_texts, join_groupings
from medkit.data.raw_questions import POOL_SHARES, DataError, Pool, count_rejected, pool_of_group, rejection_reason
from medkit.params import OWN, SPLITS, DatasetParams, digest

MADE = {"icd_chapter": "icd_chapter", "records": "record", "records_b": "record_b"}  # dataset → kind of question
SECOND_FORM = "record_b"
MORE_DIAGNOSES = 3  # times as many diagnoses are made as are asked for, so that each split has most of its categories
COLUMNS = ["id", "source", "split", "group", "kind", "question", "context", "options", "answer", "subject"]


def load_questions(
    datasets: dict[str, DatasetParams], paths: dict[str, Path], seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All questions of all datasets, before splitting, and what was rejected (`count_rejected`).

    A question that comes with two answers is rejected in every row. Warns where more than half of a dataset is
    rejected. Raises DataError for a dataset without a reader, and for one without any usable question.
    """
    rows, rejected = [], []
    for name, dataset in datasets.items():
        number = 0
        for number, record in enumerate(_read_records(name, dataset, paths[name], seed), 1):
            reason = rejection_reason(record)
            if reason:
                rejected.append((name, reason, record.get("row", number), record["question"]))
            else:
                rows.append({"group": None, "row": number, **record, "source": name})
        reasons = Counter(reason for source, reason, *_ in rejected if source == name)
        if reasons.total() > number / 2:
            warnings.warn(f"{name}: {reasons.total()} of {number} rows are rejected: {dict(reasons)}", stacklevel=2)
        if not rows or rows[-1]["source"] != name:
            raise DataError(f"{name}: no usable question in {paths[name]}; rejected: {dict(reasons)}; correct the file")
    questions = pd.DataFrame(rows)
    questions["id"] = [
        f"{row.source}-{digest([row.question, row.context, row.options])[:10]}" for row in questions.itertuples()
    ]
    # in whatever order the options stand
    asked = [digest([row.source, row.question, row.context, sorted(row.options)]) for row in questions.itertuples()]
    answers = pd.Series([row.options[row.answer] if row.answer >= 0 else None for row in questions.itertuples()])
    contradictory = answers.groupby(asked).transform("nunique") > 1
    repeated = questions.duplicated("id") & ~contradictory
    for reason, bad in (("one question with two answers", contradictory), ("the same question again", repeated)):
        rejected += [(row.source, reason, row.row, row.question) for row in questions[bad].itertuples()]
    questions = questions[~(contradictory | repeated)].drop(columns="row")
    return questions.reset_index(drop=True), count_rejected(rejected)


def _read_records(name: str, dataset: DatasetParams, path: Path, seed: int) -> Iterator[dict]:
    origin = dataset.origin
    if origin.kind in OWN and name in (*readers.READERS, *MADE):
        raise DataError(f"data.datasets.{name}: a dataset that medkit knows has this name; give your own another one")
    if origin.kind == "table":
        return readers.read_table(path, origin)
    if origin.kind == "instructions":
        return readers.read_instructions(path, origin)
    if name in MADE:
        return _make_records(name, dataset, path, seed)
    if name not in readers.READERS:
        known = sorted([*readers.READERS, *MADE])
        raise DataError(f"{name}: no reader for this dataset; known: {known}; your own is a `table` or `instructions`")
    return readers.read_hub(name, path, origin.subset) if origin.kind == "hub" else readers.READERS[name](path)


def _make_records(name: str, dataset: DatasetParams, path: Path, seed: int) -> Iterator[dict]:
    """Records of a dataset that is made, more than the splits need: they are drawn from as many groups as possible."""
    wanted = [getattr(dataset, split) for split in SPLITS]
    if "all" not in wanted:
        needs = {"train": sum(wanted[:3]), "valid": dataset.valid, "test": dataset.test}
        counts = {pool: int(1.25 * count) + 4 for pool, count in needs.items() if count}
    elif name != "icd_chapter":
        raise DataError(f"{name}: consultations have no end; write numbers in data.datasets.{name}, not `all`")
    if name == "icd_chapter":
        concepts = icd10_questions.read_icd_concepts(path)
        needed = 0 if "all" in wanted else max((int(n / POOL_SHARES[pool]) for pool, n in counts.items()), default=0)
        count = -1 if "all" in wanted else 40 + MORE_DIAGNOSES * needed
        return icd10_questions.make_icd_questions(concepts, count, seed)
    return consultations.make_consultations(consultations.read_drug_names(path), MADE[name], counts, seed)


def assign_pools(questions: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Give every question a group and the pool (train, valid, test or transfer) that its whole group belongs to.

    A group that a user's own file names (readers.NAMED) is joined with the near-duplicates of its rows.

    A group with an official test question is a test group: members without an official place may be tested too,
    members with another official place are dropped, because they would leak. A group with other official members is a
    training group. A group without an official place goes to a pool by a seeded hash of its name, in every source the
    same. Returns the table with `group` and `pool`.
    """
    questions = questions.copy()
    named = questions.group.fillna("").str.startswith(readers.NAMED)
    free = questions.group.isna() | named
    # Near-duplicates are grouped over all sources together. A group is named by its smallest id, so that a question's
    # pool does not depend on which other sources are there.
    names = questions.group[free].where(named[free], "row:" + questions.id[free])
    labels = join_groupings(group_near_duplicates(grouping_texts(questions[free])), pd.factorize(names)[0])
    questions.loc[free, "group"] = "text:" + questions.id[free].groupby(labels).transform("min")
    official = questions.pool.where(questions.pool.notna(), "")
    test_groups = set(questions.group[official == "test"])
    official_groups = set(questions.group[official != ""])

    def pick_pool(group: str, place: str) -> str:
        if group in test_groups:
            return "test" if place in ("test", "") else "leak"
        if place or group in official_groups:
            return place or "train"
        return pool_of_group(group, seed)

    questions["pool"] = [pick_pool(group, place) for group, place in zip(questions.group, official, strict=True)]
    return questions[questions.pool != "leak"].reset_index(drop=True)


def take_splits(questions: pd.DataFrame, datasets: dict[str, DatasetParams], seed: int) -> pd.DataFrame:
    """Draw each dataset's number of questions per split from its pools; returns the final table (COLUMNS).

    A split has rows of as many groups of its pool as possible: those of one group are answered alike. The pool `train`
    serves three splits, and valid too where a source has no pool for it (of as few groups as hold its rows): no group
    is in two of them. `transfer` and `private` get groups in proportion to their rows. `transfer` begins with the rows
    that have no published answer; `all` means these alone. Raises DataError if too few questions are left for a split.
    """
    drawn = []
    for name, dataset in datasets.items():
        rows = questions[questions.source == name].sample(frac=1, random_state=seed)
        pools = {pool: rows[rows.pool == pool] for pool in get_args(Pool)}
        if pools["valid"].empty and dataset.valid != "all":
            pools["valid"] = _take_groups(pools["train"], dataset.valid, seed)
        # rows of a group can have official places of their own: what valid draws is not drawn again
        drawn_of = {"test": _by_turns(pools["test"], dataset.test), "valid": _by_turns(pools["valid"], dataset.valid)}
        without_valid = pools["transfer"][~pools["transfer"].group.isin(drawn_of["valid"].group)]
        drawn_of["transfer"] = _by_turns(without_valid, dataset.transfer)
        known = [*pools["valid"].group, *drawn_of["transfer"].group]
        left = pools["train"][~pools["train"].group.isin(known)]
        for split in ("test", "valid", "labelled", "transfer", "private"):
            wanted = getattr(dataset, split)
            taken = drawn_of.get(split, left)
            if wanted != "all" and split in ("labelled", "private"):
                taken = _take_groups(left, wanted, seed, 0.25 if split == "labelled" else 1.0, split == "labelled")
            elif wanted != "all" and split == "transfer":
                missing, private = wanted - len(taken), len(left) if dataset.private == "all" else dataset.private
                taken = pd.concat([taken, _take_groups(left, missing, seed, missing / max(1, missing + private))])
            if wanted != "all" and wanted > len(taken):
                raise DataError(
                    f"{name}: {wanted} questions asked for {split}, {len(taken)} are there; "
                    f"lower data.datasets.{name}.{split} or write `all`"
                )
            drawn.append(taken.assign(split=split))
            left = left[~left.group.isin(taken.group)]
    table = pd.concat(drawn)[COLUMNS].sort_values(["source", "split", "id"], ignore_index=True)
    leaking = set(table.group[table.split == "test"]) & set(table.group[table.split != "test"])
    if leaking:
        raise DataError(f"groups {sorted(leaking)[:3]} are in test and in another split; run `assign_pools` first")
    return table


def _take_groups(
    rows: pd.DataFrame, count: int, seed: int, share: float = 0.0, by_subject: bool = False
) -> pd.DataFrame:
    """`count` rows of random groups: as many groups as hold so many rows, and at least a `share` of all.

    Fewer rows if there are fewer; no more groups than rows. Sixty rows of twenty ICD categories would teach less than
    sixty of sixty. `by_subject`: groups of the subjects in turn, since a chapter without a label is never answered.
    """
    sizes = rows.groupby("group").size().sample(frac=1, random_state=seed)
    if by_subject:
        subjects = rows.groupby("group").subject.first()[sizes.index]
        sizes = sizes.iloc[subjects.groupby(subjects).cumcount().argsort(kind="stable")]
    last_row = sizes.cumsum()
    groups = int((last_row < count).sum()) + 1 if count else 0
    groups = max(groups, min(count, int(share * len(last_row))))
    return _by_turns(rows[rows.group.isin(last_row.index[:groups])], count)


def _by_turns(rows: pd.DataFrame, count: int | str) -> pd.DataFrame:
    """The first `count` rows, or "all", where each group gives its first row before any gives its second."""
    return rows if count == "all" else rows.iloc[rows.groupby("group").cumcount().argsort(kind="stable")].head(count)


def training_rows(questions: pd.DataFrame, split: str, second_form: bool = False) -> pd.DataFrame:
    """The rows of a split that a model may train on; those of `transfer` without options and answer (−1).

    second_form: the rows of SECOND_FORM and no others. Without it they are left out: teacher, students and
    quantization see nothing of the form that the adapter of notebook 03 learns. Raises DataError for `test` and for an
    empty split.
    """
    if split == "test":
        raise DataError("split 'test' is for notebooks 05 and 06 alone; train on 'labelled', choose on 'valid'")
    rows = questions[(questions.split == split) & ((questions.kind == SECOND_FORM) == second_form)]
    rows = rows.reset_index(drop=True)
    if rows.empty:
        raise DataError(f"split {split!r} is empty; raise data.datasets.*.{split} in the params")
    if split == "transfer":
        rows = rows.assign(answer=-1, options=[[] for _ in range(len(rows))])
    return rows


def transfer_answers(questions: pd.DataFrame) -> pd.DataFrame:
    """The transfer rows whose answer is known, with it: for the ceiling alone, a student that is told everything."""
    return questions[(questions.split == "transfer") & (questions.answer >= 0)].reset_index(drop=True)


def drop_long(questions: pd.DataFrame, count_tokens: Callable[[dict], int], max_prompt_tokens: int) -> pd.DataFrame:
    """The questions whose prompt fits, with `prompt_tokens`. Raises DataError if a (source, split) loses all rows."""
    lengths = np.array([count_tokens(row) for row in questions.to_dict("records")])
    short = questions.assign(prompt_tokens=lengths)[lengths <= max_prompt_tokens]
    lost = set(questions.groupby(["source", "split"]).groups) - set(short.groupby(["source", "split"]).groups)
    if lost:
        limit = f"data.max_prompt_tokens={max_prompt_tokens}"
        raise DataError(f"{sorted(lost)}: every prompt is longer than {limit}; raise it")
    return short.reset_index(drop=True)
