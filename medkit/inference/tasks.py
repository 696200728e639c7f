"""What an edge file was taught, as `student.tasks.json` beside it says, and the messages that ask for it."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from medkit.prompts.templates import LETTERS, RECORD_B, TEMPLATES
from medkit.quantization.gguf_export import check_manifest
from medkit.stage import MedkitError, reading
from medkit.variants import TASKS

ASKS = {  # what the model can do, by the kind of a question (`data.COLUMNS`)
    "icd_chapter": "name the ICD-10-CM chapter of a diagnosis (“Which ICD-10-CM chapter lists …?”)",
    "record": "write the record of a consultation (lines that begin with D: and P:)",
    "record_b": f"write it in another form (the same lines, and at their end “{RECORD_B.instruction}”)",
    "choice": "answer an exam question with listed options (A. …)",
}
SCORES = {
    "accuracy": "right for {:.0%} of {} test questions with few options",
    "field_f1": "F1 {:.2f} on {} test dialogues",
}
OPTION = re.compile(r"^[ \t]*([A-J])[.):][ \t]+(\S.*)$", re.MULTILINE)
_TURN = re.compile(r"^(D|P)(?:octor|r|atient|t)?\.?:", re.MULTILINE)
_ICD = re.compile(
    r"(?:(?:in |to |under )?(?:which|what(?:'s| is)?)(?: the)? |(?:(?:name|give me|tell me) )?the )?"
    r"ICD(?:-?10)?(?:-CM)? chapter (?:lists?|has|holds|contains?|covers?|includes?|of|for|is)"
    r" +[\"“”'‘]*(?P<diagnosis>[^\n?!]{2,200}?)[\"“”'’]*\s*[?.]?",
    re.IGNORECASE,
)


class Task(BaseModel):
    """A kind of question that the model learned, with its score on test questions."""

    source: str
    kind: str
    scoring: str
    metric: str
    value: float
    n: int
    options: list[str]  # all answers, where they are few
    least_confidence: float | None  # below it the answer is withheld; None: not measured


def read_tasks(path: Path) -> list[Task]:
    """The tasks of the GGUF file at `path`. Raises MedkitError if they are missing, damaged or of another file."""
    file = path.with_suffix(TASKS)
    with reading(file, MedkitError, "run notebook 06_evaluation, which writes it"):
        content = json.loads(file.read_text())
        tasks = [Task(**task) for task in content["tasks"] if task["kind"] in ASKS]
    if content.get("sha256") != check_manifest(path)["sha256"]:
        raise MedkitError(f"{file} holds the scores of another file: run notebook 06_evaluation again")
    return tasks


def describe(tasks: Sequence[Task]) -> str:
    """One sentence: what the model is for, and how well it does."""
    taught = [f"to {ASKS[task.kind]}, {SCORES[task.metric].format(task.value, task.n)}" for task in tasks]
    return (
        f"I am a research model that was taught {', and '.join(taught) or 'nothing that was tested'}; I do not answer "
        "anything else, and in an emergency call your emergency number."
    )


def recognise(message: str, tasks: Sequence[Task]) -> tuple[Task, dict] | None:
    """The task that a message asks for, and the message as a question row of that task; None if none does.

    A question of the ICD chapter is put into the words of training; without options it gets all of them.
    """
    # of several of a kind, the one that withholds most answers: a message does not say of which source it is
    of_kind = {task.kind: task for task in sorted(tasks, key=lambda task: task.least_confidence or 0.0)}
    options = list(OPTION.finditer(message))
    is_list = len(options) > 1 and [m[1] for m in options] == list(LETTERS[: len(options)])
    listed = [m[2].rstrip() for m in options] if is_list else []
    asked = message[: options[0].start()].strip() if is_list else message.strip()
    row = {"context": "", "options": listed, "listed": bool(listed)}
    # a long text is no diagnosis, and would hold the pattern up for minutes
    if (task := of_kind.get("icd_chapter")) and len(asked) <= 400 and (icd := _ICD.fullmatch(asked)):
        question = f"Which ICD-10-CM chapter lists “{icd['diagnosis']}”?"
        return task, row | {"question": question, "options": listed or task.options}
    turns = list(_TURN.finditer(message))
    kind = "record_b" if message.rstrip().endswith(RECORD_B.instruction) else "record"
    if kind in of_kind and {m[1] for m in turns} == {"D", "P"}:
        dialogue = message[turns[0].start() :].strip().removesuffix(TEMPLATES[kind].instruction).strip()
        return of_kind[kind], row | {"question": _TURN.sub(r"\1:", dialogue), "options": []}
    if "choice" in of_kind and listed and asked:
        return of_kind["choice"], row | {"question": asked}
    return None
