"""How `medkit serve` answers a chat: what the model is asked, and which fixed text comes before its answer."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from medkit.data.problem_types import classify_by_keywords
from medkit.data.splits import SECOND_FORM
from medkit.inference import emergencies
from medkit.inference.server_engine import ADAPTER_ON
from medkit.inference.tasks import OPTION, Task, describe, recognise
from medkit.prompts import templates
from medkit.stage import DISCLAIMER


class Plan(NamedTuple):
    """How one request is answered."""

    chat: dict  # as the model's server gets it; {} for what is no chat
    facts: dict  # the `metadata` of the answer
    first: str = ""  # a fixed text before what the model says
    template: templates.Template | None = None
    task: Task | None = None
    question: dict | None = None  # of the task, as a question row
    asks_model: bool = True


def make_plan(chat: dict, tasks: Sequence[Task] | None, broken_up: Mapping[str, str]) -> Plan:
    """The plan for a chat, whose last turn decides: a task is asked alone, as in training.

    `tasks`: what the model was taught; for anything else the first text is the whole answer. None: nothing is known of
    the model, so a question gets the template of its problem type; a chat with a system message stays as it is.
    `broken_up`: control tokens, and the text that is written in place of each. Raises ValueError without a list of
    messages.
    """
    turns = chat.get("messages")
    if not isinstance(turns, list):
        raise ValueError("an object with a list of messages is needed")
    last = turns[-1] if turns and isinstance(turns[-1], dict) else {}
    message = read_text(last.get("content")) if last.get("role") == "user" else ""
    recognised = recognise(message, tasks or [])
    plan = Plan(chat, {"disclaimer": DISCLAIMER})
    # a diagnosis that is asked for is nobody's, and in a consultation a doctor is already there
    is_record_or_code = recognised and recognised[0].kind in ("icd_chapter", *templates.FORMS)
    if not is_record_or_code and emergencies.is_emergency(message):
        plan = Plan(chat, plan.facts | {"emergency": emergencies.SENTENCE}, emergencies.SENTENCE)
    if recognised:
        task, question = recognised
        for token, text in broken_up.items():
            question["question"] = question["question"].replace(token, text)
        template = templates.pick_template(task.kind, task.scoring)
        wanted = {"messages": templates.render(question, template)}
        if form := templates.FORMS.get(task.kind):
            schema = {"name": task.kind, "schema": form.model_json_schema()}
            settings = {"response_format": {"type": "json_schema", "json_schema": schema}, "temperature": 0}
            wanted |= {name: value for name, value in settings.items() if chat.get(name) is None}
            wanted |= ADAPTER_ON if task.kind == SECOND_FORM else {}
        return plan._replace(chat=chat | wanted, template=template, task=task, question=question)
    if tasks is not None:
        return plan._replace(first=plan.first or describe(tasks), asks_model=False)
    parts = last.get("content") if isinstance(last.get("content"), list) else []
    if any(not (isinstance(part, dict) and isinstance(part.get("text"), str)) for part in parts):
        return plan  # an image must reach a model that can read it
    if not message or any(isinstance(turn, dict) and turn.get("role") in ("system", "developer") for turn in turns):
        return plan
    lists_options = {"A", "B"} <= {letter for letter, _ in OPTION.findall(message)}
    template = templates.LETTER if lists_options else templates.OPEN[classify_by_keywords(message)]
    system, question = templates.render({"context": "", "question": message, "options": []}, template)
    return plan._replace(chat=chat | {"messages": [system, *turns[:-1], question]}, template=template)


def read_text(content) -> str:
    """The text of a message: a string, or a list of parts as LangChain writes it."""
    parts = content if isinstance(content, list) else [{"text": content}]
    return "\n".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))
