"""Does a thought before the answer help a small student? One whose truth can be checked: a path through ICD-10-CM.

A teacher, all of whose weights learn, writes the category and the block of a diagnosis as its thought, and then the
chapter as its answer, without options. It writes both for questions without labels. Students that are cut from the
downloaded model as in notebook 02 learn from these texts in one pass: `with_thoughts`; `equal_tokens`, the answers
alone, with as many tokens read in training (prompt, thought and answer, before equal beginnings are shared), so from
more questions; and `equal_examples`, the answers alone to the questions of `with_thoughts`. A thinker is asked under
several budgets: its thought is closed after so many tokens, and 0 is an empty thought, as in the training of the other
two. All answer the same questions, of categories that no model learned from. Each trained or written part is kept in
outputs/<name>: a killed run goes on. Intervals resample categories. One seed. Units: shares, tokens.
"""

import argparse
import re
import shutil
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.record import RESULTS, Ratio, versions, write
from medkit import data, distillation, evaluation, inference, modeling, sources
from medkit.data.icd10_questions import read_icd_concepts
from medkit.distillation.answers import answer_rows, collect_answers, weights_of
from medkit.modeling.batches import Example
from medkit.modeling.train_once import find_record, key_of, load_for_training, recorded, train_once
from medkit.params import Params, load_params
from medkit.prompts import templates
from medkit.stage import ROOT, Stage
from medkit.statistics import mean_intervals

# tokens that no question has, under new names; of SmolLM2's spare ones most have one and the same embedding
SPARE = {"<repo_name>": "<think>", "<filename>": "</think>"}
BF16 = {f"distillation.{name}_train.bf16": True for name in ("correction", "student")} | {"models.dtype": "bfloat16"}
WHOLE = 96  # more than any path; a thought that has not ended then is closed
BUDGETS = (0, 4, 8, 16, 32, WHOLE)
ASKED = {"teacher": (0, WHOLE), "with_thoughts": BUDGETS, "equal_tokens": (0,), "equal_examples": (0,)}
BASELINE = "equal_tokens, 0"
THINKER = f"with_thoughts, {WHOLE}"
STEPS = [
    (THINKER, BASELINE, "equal tokens"),
    (THINKER, "equal_examples, 0", "equal examples"),
    (THINKER, "with_thoughts, 0", "the same student without a thought"),
    (BASELINE, "equal_examples, 0", "more answers"),
]
AFTERWARDS = [  # chosen when the other results were seen: a family of their own, and marked as not planned
    ("with_thoughts, 0", BASELINE, "learning thoughts, answering without one"),
    (f"teacher, {WHOLE}", "teacher, 0", "the teacher without a thought"),
]


@dataclass(frozen=True)
class Hierarchy:
    """The tabular list of ICD-10-CM by names. A path is the thought: its category and its block."""

    paths: dict[str, str]  # by diagnosis
    chapters: dict[str, str]  # by block

    @classmethod
    def from_file(cls, path: Path) -> "Hierarchy":
        concepts, sections = read_icd_concepts(path), list(ET.parse(path).getroot().iter("section"))
        names = {d.findtext("name"): d.findtext("desc") for section in sections for d in section.findall("diag")}
        names |= {s.get("id"): re.sub(r" \([A-Z]\w\w-[A-Z]\w\w\)$", "", s.findtext("desc")) for s in sections}
        blocks = concepts.section.map(names)
        paths = dict(zip(concepts.description, concepts.category.map(names) + " > " + blocks, strict=True))
        return cls(paths, dict(zip(blocks, concepts.chapter, strict=True)))

    def path_of(self, question: str) -> str:
        return self.paths[re.search("“(.*)”", question)[1]]


def read_questions(params: Params, sizes: dict[str, int]) -> tuple[pd.DataFrame, Hierarchy]:
    """Questions of all chapters; those of a category are in one split."""
    section = params.data.datasets["icd_chapter"].model_copy(update=sizes)
    datasets, path = {"icd_chapter": section}, sources.fetch(section.origin)
    questions, _ = data.load_questions(datasets, {"icd_chapter": path}, params.seed)
    questions = data.take_splits(data.assign_pools(questions, params.seed), datasets, params.seed)
    hierarchy = Hierarchy.from_file(path)
    options = sorted(set(hierarchy.chapters.values()))
    answers = [options.index(row.options[row.answer]) for row in questions.itertuples()]
    return questions.assign(options=[options] * len(questions), answer=answers, clean=True), hierarchy


def make_tokenizer(source: Path):
    """The model's tokenizer, with marks of a thought and a chat template that opens one, as R1's does."""
    with tempfile.TemporaryDirectory() as scratch:
        modeling.load_tokenizer(source).save_pretrained(scratch)
        file = Path(scratch) / "tokenizer.json"
        text = file.read_text()
        for old, new in SPARE.items():
            text = text.replace(f'"{old}"', f'"{new}"')
        file.write_text(text)
        tokenizer = modeling.load_tokenizer(Path(scratch))
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
    return tokenizer


def encode(tokenizer, questions: pd.DataFrame, thoughts: Sequence[str | None]) -> list[Example]:
    """One example per question; the loss covers thought, answer and end token."""
    examples = []
    for question, thought in zip(questions.to_dict("records"), thoughts, strict=True):
        messages = templates.render(question, templates.TEXT)
        answer = question["options"][question["answer"]]
        prompt_ids, answer_ids = templates.encode(tokenizer, messages, answer, thought)
        examples.append(Example([*prompt_ids, *answer_ids], len(prompt_ids)))
    return examples


def train_teacher(stage: Stage, params: Params, questions: pd.DataFrame, hierarchy: Hierarchy) -> dict:
    """Write `teacher/`, which thinks, and `base/`, from which students start."""
    section, source = params.distillation, params.models.teacher
    folder = modeling.local_folder(source)
    tokenizer = make_tokenizer(folder)
    valid, private = (data.training_rows(questions, split) for split in ("valid", "private"))
    examples = encode(tokenizer, private, private.question.map(hierarchy.path_of))
    teacher = load_for_training(folder, params.models, source.keep_layers)
    loss, train = modeling.cross_entropy, section.correction_train
    log = train_once(stage, "teacher", teacher, tokenizer, examples, train, loss, params.seed)
    base = modeling.load_model(folder, params.models, source.keep_layers)
    some = encode(tokenizer, valid, valid.question.map(hierarchy.path_of))[: section.calibration_examples]
    removed = len(base.get_decoder().layers) - section.num_layers
    kept = distillation.remove_block(distillation.measure_blocks(base, some, removed), removed)
    modeling.save_model(modeling.keep_layers(base, kept), tokenizer, stage.path("base"))
    return count(examples) | {"steps": len(log)}


def count(examples: list[Example]) -> dict:
    tokens, loss_tokens = sum(len(e.input_ids) for e in examples), sum(e.num_predicted for e in examples)
    return {"examples": len(examples), "tokens": tokens, "loss_tokens": loss_tokens}


def student_examples(tokenizer, written: pd.DataFrame) -> dict[str, list[Example]]:
    """What each student learns of the teacher's answers (`answer_rows`, with `thought`)."""
    answers, thoughts = (encode(tokenizer, written, column) for column in ([None] * len(written), written.thought))
    lengths = np.cumsum([len(example.input_ids) for example in thoughts])
    few = int((lengths <= count(answers)["tokens"]).sum())
    return {"with_thoughts": thoughts[:few], "equal_tokens": answers, "equal_examples": answers[:few]}


def train_student(stage: Stage, params: Params, name: str, examples: list[Example]) -> dict:
    """Write the folder `name`."""
    base, train, loss = stage.dir / "base", params.distillation.student_train, modeling.cross_entropy
    student, tokenizer = load_for_training(base, params.models), modeling.load_tokenizer(base)
    log = train_once(stage, name, student, tokenizer, examples, train, loss, params.seed)
    return count(examples) | {"steps": len(log)}


def ask(stage: Stage, params: Params, name: str, budget: int, questions: pd.DataFrame) -> pd.DataFrame:
    """The answers of a model under a budget, kept in a file, with the `thought` apart."""
    path, limit = stage.path(f"{name}_{budget}.parquet"), params.inference.max_new_tokens
    key = key_of([budget, limit], [weights_of(stage.dir / name), questions.id.tolist()], inference.predict)
    tokenizer = modeling.load_tokenizer(stage.dir / name)
    if find_record(path, key) is None:
        model = modeling.load_model(stage.dir / name, params.models)
        asked, sizes = questions.assign(scoring="generated"), (params.inference.batch_tokens, limit)
        with recorded(path, key):
            stage.write_table(path.name, inference.predict(model, tokenizer, asked, *sizes, budget or None))
    marks = templates.thinking_of(tokenizer)
    table = pd.read_parquet(path)
    thoughts = [text.removeprefix(marks.opening).partition(marks.closing)[0] if budget else "" for text in table.text]
    named = table.assign(variant=f"{name}, {budget}", model=name, budget=budget)
    return named.assign(thought=thoughts, answer_tokens=table.answer_tokens.map(sum))


def measure_paths(answers: pd.DataFrame, hierarchy: Hierarchy, confidence: float) -> Iterator[dict]:
    """Per model: how many of its whole thoughts are true, in full or in part, and how many answers are right then."""
    known = set(hierarchy.paths.values())
    for name, table in answers[answers.budget == WHOLE].groupby("model", sort=False):
        true = table.question.map(hierarchy.path_of)
        blocks, chapters = table.thought.str.rpartition(" > ")[2], [*table.options.iloc[0], None]
        path_true, block_true = table.thought == true, blocks == true.str.rpartition(" > ")[2]
        category_true = table.thought.str.partition(" > ")[0] == true.str.partition(" > ")[0]
        block_exists, said = blocks.isin(hierarchy.chapters), [chapters[choice] for choice in table.choice]
        follows = (blocks.map(hierarchy.chapters) == said)[block_exists]
        shares = {
            "path exists": table.thought.isin(known), "path true": path_true, "category true": category_true,
            "block exists": block_exists, "block true": block_true, "answer is the chapter of the block": follows,
            "accuracy, path true": table.correct[path_true], "accuracy, path false": table.correct[~path_true],
            "accuracy, block true": table.correct[block_true], "accuracy, block false": table.correct[~block_true],
        }  # fmt: skip
        for what, values in shares.items():
            if len(values):
                groups = table.group[values.index]
                low, high = mean_intervals(values.to_numpy()[:, None], groups, confidence, imagined=(0, 0, 1, 1))
                row = {"value": float(values.mean()), "ci_low": low[0], "ci_high": high[0], "n": len(values)}
                yield {"model": name, "what": what, **row}


def summarise(
    answers: pd.DataFrame, test: pd.DataFrame, hierarchy: Hierarchy, params: Params
) -> tuple[dict, dict[str, Ratio]]:
    """Accuracy and length per model and budget, paired differences (STEPS), and what the paths are worth."""
    judging, keys = params.evaluation, ["variant", "model", "budget"]
    judged = evaluation.judge(answers, test)
    accuracy = evaluation.measure_accuracy(judged, judging.confidence)
    lengths = answers.groupby(keys, sort=False)[["thinking_tokens", "answer_tokens"]].mean().reset_index()
    accuracy = lengths.merge(accuracy, on="variant").drop(columns=["source", "scoring"])
    limits = judging.confidence, judging.power, judging.margin
    families = [evaluation.compare_steps(judged, *limits, steps).assign(planned=steps is STEPS)
                for steps in (STEPS, AFTERWARDS)]  # fmt: skip
    steps = pd.concat(families, ignore_index=True)
    whole = answers[[*keys, "id", "thought"]].merge(judged[["variant", "id", "group", "choice", "correct"]])
    whole = whole.merge(test[["id", "question", "options"]])
    paths = measure_paths(whole, hierarchy, judging.confidence)
    summary = {
        "accuracy": accuracy.to_dict("records"),
        "steps": steps.drop(columns=["source", "scoring"]).to_dict("records"),
        "paths": list(paths),
    }
    ratios = {
        f"{row.variant} minus {row.baseline}/accuracy": Ratio(row.difference, None, "higher", row.n)
        for row in steps.itertuples()
    }
    written = accuracy.set_index("variant")[["thinking_tokens", "answer_tokens"]].sum(axis=1)
    share = Ratio(written[THINKER] / written[BASELINE], None, "lower", len(test))
    return summary, ratios | {f"{THINKER} over {BASELINE}/written_tokens": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=ROOT / "params" / "tiny.yaml")
    parser.add_argument("--private", type=int, default=1500, help="questions that teach the teacher")
    parser.add_argument("--transfer", type=int, default=750, help="questions that it answers for the students")
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1, help="more only on an idle machine")
    parser.add_argument("--name", default="thinking", help="of the folder in outputs/ where parts are kept")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    params, stage = load_params(args.params, BF16), Stage(args.name, "02_distillation")
    sizes = {"private": args.private, "labelled": 0, "transfer": args.transfer, "valid": 16, "test": args.test}
    questions, hierarchy = read_questions(params, sizes)
    trained = {"teacher": train_teacher(stage, params, questions, hierarchy)}
    transfer, limit = data.training_rows(questions, "transfer"), params.inference.max_new_tokens
    table = collect_answers(
        stage.path("teacher_answers.parquet"), stage.dir / "teacher", params, transfer, inference.make_engine, limit,
        max_thinking_tokens=WHOLE,
    )  # fmt: skip
    written = answer_rows(transfer, table)
    written["thought"] = written.id.map(table.set_index("id").thought)
    for name, examples in student_examples(modeling.load_tokenizer(stage.dir / "base"), written).items():
        trained[name] = train_student(stage, params, name, examples)
    shutil.rmtree(stage.path("checkpoints"), ignore_errors=True)

    test = questions[questions.split == "test"].reset_index(drop=True)
    answers = [ask(stage, params, name, budget, test) for name, budgets in ASKED.items() for budget in budgets]
    summary, ratios = summarise(pd.concat(answers, ignore_index=True), test, hierarchy, params)
    summary |= {"trained": trained, "written": {"asked": len(table), "finished": len(written)}}
    for rows in ("accuracy", "steps", "paths"):
        print(pd.DataFrame(summary[rows]).to_string(float_format="{:.3f}".format))
    setup = {
        "params": args.params.name, "questions": sizes, "budgets": BUDGETS, "seed": params.seed,
        "train": {name: params.distillation.model_dump()[name] for name in ("correction_train", "student_train")},
        "layers": params.distillation.num_layers, "threads": args.threads,
        "versions": versions("torch", "transformers", "peft"),
    }  # fmt: skip
    write("thinking", setup, ratios, summary, args.output, summary)


if __name__ == "__main__":
    main()
