"""Source records → one questions table, split so that near-duplicates never stand on both sides.

Readers turn files into rows of one schema; `assign_pools` decides by group, not by row, where a question may go;
`take_splits` draws the numbers the params ask for. Rows that are no question are rejected with a reason, and counted.
Nothing here knows a model: token counting comes in as a function.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from medkit.params import SPLITS, DatasetParams, digest

COLUMNS = ["id", "source", "split", "group", "kind", "question", "context", "options", "answer", "subject"]
POOL_SHARES = {"test": 0.35, "valid": 0.05, "train": 0.60}  # of the groups of a source that has no official split
SHINGLE_WORDS = 8
COMMON_SHINGLE = 20  # a shingle in more questions than this is a phrase of the trade, not a sign of copying
SHARED_FRACTION = 0.5


class DataError(ValueError):
    """Data that cannot be used as asked; the message names the source, the value and the cure."""


# --- readers: a path → records {question, context, options, answer, subject, kind, pool, group} --------------------


def _clean(text: str) -> str:
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip()


def split_options(text: str) -> list[str]:
    """`"A. one\\nB. two"` → `["one", "two"]`; a line break inside an option stays inside it.

    The 103 validation questions of MedMCQA with an option `nan` had the text "None" there before pandas read them.
    """
    parts = re.split(r"(?m)^[A-J]\.[ \t]*", text)[1:]
    return ["None" if _clean(part) == "nan" else _clean(part) for part in parts]


def _read_jsonl(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}:{number}: not a json line ({error}); download the source again") from error


def _lettered(path: Path, pool: str | None, subject: str = "") -> Iterator[dict]:
    for record in _read_jsonl(path):
        letter = record.get("answer", "")[:1]
        yield {
            "question": _clean(record["question"]),
            "context": "",
            "options": split_options(record.get("options", "")),
            "answer": "ABCDEFGHIJ".index(letter) if letter else -1,
            "subject": subject,
            "kind": "choice",
            "pool": pool,
        }


def read_medqa(path: Path) -> Iterator[dict]:
    """MedQA-USMLE, the official test questions in their five-option form."""
    yield from _lettered(path / "MedQA" / "test.jsonl", pool="test")


def read_mmlu(path: Path) -> Iterator[dict]:
    """The six medical subjects of MMLU, test only."""
    yield from _lettered(path / "MMLU" / "clinical.jsonl", pool="test")


def read_medmcqa(path: Path) -> Iterator[dict]:
    """MedMCQA: the validation questions (re-split by group here), and the unlabelled test questions for transfer."""
    for folder, pool in (("MedMCQA-Validation", None), ("MedMCQA-Test", "transfer")):
        for file in sorted((path / "MedMCQA" / folder).glob("*.jsonl")):
            yield from _lettered(file, pool, subject=file.stem.replace("_", " "))


def _abstracts(path: Path, pool: str | None) -> Iterator[dict]:
    choices = ["yes", "no", "maybe"]
    for record in _read_jsonl(path):
        yield {
            "question": _clean(record["question"]),
            "context": _clean(re.sub(r"Context \(\d+\): ", "", record["passage"])),
            "options": choices,
            "answer": choices.index(record["answer"]),
            "subject": "biomedical research",
            "kind": "abstract",
            "pool": pool,
        }


def read_pubmedqa(path: Path) -> Iterator[dict]:
    """PubMedQA-L, 500 expert-labelled test questions, each over an abstract."""
    yield from _abstracts(path / "PubMedQA" / "pqal" / "test.jsonl", pool="test")


def read_pubmedqa_a(path: Path) -> Iterator[dict]:
    """PubMedQA-A, 500 machine-labelled questions: to learn from, never to be graded on."""
    yield from _abstracts(path / "PubMedQA" / "pqaa" / "test.jsonl", pool="train")


def read_icd_concepts(path: Path) -> pd.DataFrame:
    """Leaf diagnoses of the ICD-10-CM tabular list: code, description, category (A00), section, chapter."""
    rows = []
    for chapter in ET.parse(path).getroot().iter("chapter"):
        name = re.sub(r" \([A-Z]\w\w-[A-Z]\w\w\)$", "", chapter.findtext("desc"))
        for section in chapter.iter("section"):
            for diagnosis in section.iter("diag"):
                if diagnosis.find("diag") is None:
                    code, text = diagnosis.findtext("name"), _clean(diagnosis.findtext("desc"))
                    rows.append((code, text, code[:3], section.get("id"), name))
    concepts = pd.DataFrame(rows, columns=["code", "description", "category", "section", "chapter"])
    return (
        concepts[concepts.chapter != "Codes for special purposes"].drop_duplicates("description").reset_index(drop=True)
    )


def make_icd_questions(concepts: pd.DataFrame, kind: str, count: int, seed: int) -> Iterator[dict]:
    """`count` four-option questions, spread evenly over the chapters; the same ones for the same seed.

    kind `icd_chapter`: which chapter lists a diagnosis. `icd_easy`, `icd_hard`: which diagnosis a code stands for,
    with wrong options from other chapters, or from the code's own section (as MedConceptsQA has it).
    """
    rng = np.random.default_rng([seed, int(digest(kind), 16)])
    shuffled = concepts.iloc[rng.permutation(len(concepts))]
    turn = shuffled.groupby("chapter").cumcount()
    inside = {name: rows.description.to_numpy() for name, rows in concepts.groupby("section")}
    outside = {name: concepts.description[concepts.chapter != name].to_numpy() for name in concepts.chapter.unique()}
    chapters = np.array(list(outside))
    for row in shuffled.iloc[np.argsort(turn.to_numpy(), kind="stable")].itertuples():
        if count == 0:
            return
        if kind == "icd_chapter":
            question = f"Which ICD-10-CM chapter lists “{row.description}”?"
            right, wrong = row.chapter, chapters[chapters != row.chapter]
        else:
            question = f"What does ICD-10-CM code {row.code} stand for?"
            right = row.description
            wrong = outside[row.chapter] if kind == "icd_easy" else inside[row.section]
            wrong = wrong[wrong != right] if kind == "icd_hard" else wrong
        if len(wrong) < 3:
            continue  # a section of three codes has no hard question
        options = [right, *wrong[rng.choice(len(wrong), 3, replace=False)]]
        order = rng.permutation(4)
        count -= 1
        yield {
            "question": question,
            "context": "",
            "options": [str(options[i]) for i in order],
            "answer": int(np.argmin(order)),
            "subject": row.chapter,
            "kind": kind,
            "pool": None,
            "group": f"icd:{row.category}",
        }


READERS: dict[str, Callable] = {
    "medqa": read_medqa,
    "mmlu": read_mmlu,
    "medmcqa": read_medmcqa,
    "pubmedqa": read_pubmedqa,
    "pubmedqa_a": read_pubmedqa_a,
}
ICD_KINDS = ("icd_chapter", "icd_easy", "icd_hard")
MMLU_MEDICAL = {
    "anatomy",
    "clinical_knowledge",
    "college_biology",
    "college_medicine",
    "medical_genetics",
    "professional_medicine",
}
# hub split → pool; MedMCQA's test answers are not public, so its validation split is the one to be graded on
HUB_POOLS = {
    "medqa": {"train": "train", "test": "test"},
    "mmlu": {"test": "test"},
    "pubmedqa": {"train": "test"},
    "pubmedqa_a": {"train": "train"},
    "medmcqa": {"train": "train", "validation": "test", "test": "transfer"},
}


def read_hub(name: str, folder: Path, subset: str) -> Iterator[dict]:
    """A dataset in hub format (parquet or json files in a snapshot folder), its official splits kept."""
    from datasets import load_dataset

    for split, rows in load_dataset(str(folder), name=subset or None).items():
        for row in rows if split in HUB_POOLS[name] else ():
            if name == "mmlu" and row["subject"] not in MMLU_MEDICAL:
                continue
            yield {
                "context": "",
                "subject": "",
                "kind": "choice",
                **_hub_record(name, row),
                "pool": HUB_POOLS[name][split],
            }


def _hub_record(name: str, row: dict) -> dict:
    question = _clean(row["question"])
    match name:
        case "medqa":
            options = row["options"]
            return {
                "question": question,
                "options": list(options.values()),
                "answer": list(options).index(row["answer_idx"]),
            }
        case "medmcqa":
            return {
                "question": question,
                "options": [_clean(row[f"op{c}"]) for c in "abcd"],
                "answer": row["cop"],
                "subject": row["subject_name"],
            }
        case "mmlu":
            return {
                "question": question,
                "options": list(row["choices"]),
                "answer": row["answer"],
                "subject": row["subject"],
            }
        case _:
            choices = ["yes", "no", "maybe"]
            return {
                "question": question,
                "context": _clean(" ".join(row["context"]["contexts"])),
                "options": choices,
                "answer": choices.index(row["final_decision"]),
                "kind": "abstract",
            }


# --- one table -----------------------------------------------------------------------------------------------------


def load_questions(
    datasets: dict[str, DatasetParams], paths: dict[str, Path], seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All questions the params ask for, before splitting, and the rejected ones (source, reason, count).

    Raises DataError for a dataset without a reader and for one of which nothing is left.
    """
    frames, rejected = [], Counter()
    for name, dataset in datasets.items():
        kept = []
        for record in _records(name, dataset, paths[name], seed):
            reason = _reject(record)
            if reason:
                rejected[name, reason] += 1
            else:
                kept.append({"group": None, **record, "source": name})
        if not kept:
            raise DataError(f"{name}: no usable question in {paths[name]}; rejected: {dict(rejected)}")
        frames.append(pd.DataFrame(kept))
    questions = pd.concat(frames, ignore_index=True)
    questions["id"] = [
        f"{s}-{digest([q, c, list(o)])[:10]}"
        for s, q, c, o in questions[["source", "question", "context", "options"]].itertuples(index=False)
    ]
    twice = questions.duplicated("id")
    rejected.update((source, "the same question again") for source in questions.source[twice])
    report = pd.DataFrame([(s, r, n) for (s, r), n in rejected.items()], columns=["source", "reason", "count"])
    return questions[~twice].reset_index(drop=True), report


def _records(name: str, dataset: DatasetParams, path: Path, seed: int) -> Iterator[dict]:
    if name in ICD_KINDS:
        concepts = read_icd_concepts(path)
        wanted = {split: getattr(dataset, split) for split in POOL_SHARES}
        # a fifth more than the fullest pool needs, since pools are drawn by group and come out uneven
        count = -1 if "all" in wanted.values() else 40 + max(int(1.2 * n / POOL_SHARES[s]) for s, n in wanted.items())
        return make_icd_questions(concepts, name, count, seed)
    if name not in READERS:
        raise DataError(f"{name}: no reader for this dataset; known: {sorted([*READERS, *ICD_KINDS])}")
    return read_hub(name, path, dataset.origin.subset) if dataset.origin.kind == "hub" else READERS[name](path)


def _reject(record: dict) -> str | None:
    options = record["options"]
    if not record["question"]:
        return "empty question"
    if len(options) < 2:
        return "fewer than two options"
    if len(set(options)) < len(options):
        return "two options alike"
    if not all(options):
        return "empty option"
    if not -1 <= record["answer"] < len(options):
        return "answer is none of the options"
    if record["answer"] == -1 and record["pool"] != "transfer":
        return "no answer"
    return None


def group_near_duplicates(texts: pd.Series) -> np.ndarray:
    """Component number per text: two texts are near-duplicates if they share half of the shorter one's shingles.

    A shingle is a run of eight words; those that more than COMMON_SHINGLE texts hold are stock phrases ("which of the
    following is the most likely diagnosis") and count for nothing. Sparse: linear in words, not quadratic in texts.
    """
    rows, columns, index = [], [], {}
    for row, text in enumerate(texts):
        words = re.findall(r"\w+", text.casefold())
        shingles = {tuple(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}
        rows.extend([row] * len(shingles))
        columns.extend(index.setdefault(shingle, len(index)) for shingle in shingles)
    holds = coo_matrix((np.ones(len(rows), np.int32), (rows, columns)), shape=(len(texts), len(index))).tocsc()
    size = np.asarray(holds.sum(axis=1)).ravel()
    rare = holds[:, np.diff(holds.indptr) <= COMMON_SHINGLE].tocsr()
    shared = (rare @ rare.T).tocoo()
    near = shared.data >= SHARED_FRACTION * np.minimum(size[shared.row], size[shared.col])
    edges = coo_matrix((shared.data[near], (shared.row[near], shared.col[near])), shape=shared.shape)
    return connected_components(edges, directed=False)[1]


def assign_pools(questions: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Give every question a group and the pool (train, valid, test or transfer) its whole group belongs to.

    A group with an official test question is a test group: members with another official place are dropped, the rest
    may be tested too. A group with other official members is learned from. Groups without an official place go to a
    pool by a seeded hash of their name, alike in every source. Returns the table with `group` and `pool`, rows that
    would leak removed.
    """
    questions = questions.copy()
    free = questions.group.isna()
    told = (
        questions.options.where(questions.kind != "abstract", None).str.join(" ").fillna("")
    )  # yes/no/maybe tells nothing
    text = (questions.question + " " + told)[free]
    # the official place of a group is found by its members, so groups are numbered over all sources together
    questions.loc[free, "group"] = [f"text:{i}" for i in group_near_duplicates(text)]
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

    A `train` pool also serves `valid` for a source that is never tested. Raises DataError when a pool is too small.
    """
    taken = []
    for name, dataset in datasets.items():
        rows = questions[questions.source == name].sample(frac=1, random_state=seed)
        for split in SPLITS:
            wanted, pool = getattr(dataset, split), rows[rows.pool == split]
            if split == "valid" and not len(pool):
                pool = rows[rows.pool == "train"].tail(wanted if wanted != "all" else 0)
                rows = rows.drop(pool.index)
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
