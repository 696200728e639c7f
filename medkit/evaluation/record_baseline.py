"""The baseline of the first form: regular expressions, written by reading the phrases of the training pool alone.

A doctor's question names the topic, the patient's next line answers it. Each field has its patterns; sentences about
relatives, about drugs that were stopped and about other times are left out.
"""

import re

import pandas as pd

from medkit.prompts import templates

NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
DURATION = re.compile(rf"\b(\d+|{'|'.join(NUMBERS)}) ((?:day|week|month|year)s?)\b")
RELATIVE = re.compile(r"\b(?:my|the family, my) (?:\w+)\b.*\b(?:has|had|got|is|at|with|reacts|cannot)\b")
OTHER_TIME = re.compile(r"\b(?:worse|worst|stopped|visit|trip|slept|last)\b")
STOPPED = re.compile(
    r"\b(?:stop(?:ped)?|before that|no longer|replaced|used to|off|did not help|ended|my old|finished|quit|past|"
    r"gave up)\b"
)
TOPICS = {
    "age": r"\bage\b|\bold\b",
    "allergy": r"allerg|tolerate|react",
    "drug": r"medicin|medicat|drug|tablet|\btak(?:e|ing)\b|treated|prescri",
    "duration": r"how long|since when|when did|how many",
}
COMPLAINT = re.compile(
    r"\b(?:i have had|have|had|having|because of|problem is|about some|it is my|it is|my(?! problem)|the(?! past)|got|"
    r"came for|with|was|some) ([a-z ]+?)(?= for\b| ago| began| is killing| now|[.,]|$)"
)
DRUG = re.compile(r"(?:^|\b(?:take|of|on|me|is|yes,|just|present|use|my|only) )([a-z]{5,})\b")
NO_DRUG = {"doctor", "every", "about", "after", "daily", "taking", "nothing", "there", "which"}
ALLERGY = re.compile(r"(?:\b(?:to|from|with|after|avoid|stand) |^yes, )(?:the )?([a-z ]+?)(?= i\b|[.,;]|$)")
DENIED = re.compile(r"\b(?:no|not|none|never|without)\b")
WOMAN, MAN = (
    re.compile(r"\b(?:mrs|ms|ma'am|woman|(?:grand)?mother)\b"),
    re.compile(r"\b(?:mr|sir|man|(?:grand)?father)\b"),
)


def fill_form(dialogue: str) -> dict:
    """The fields of the first form in a dialogue with a line per turn, `D: …` and `P: …`."""
    record = dict.fromkeys(templates.FORMS["record"].model_fields)
    lines = [line[3:].casefold() for line in dialogue.splitlines()]
    for i, (question, answer) in enumerate(zip(lines[::2], lines[1::2], strict=False)):
        topic = next((name for name, pattern in TOPICS.items() if re.search(pattern, question)), "symptom")
        sentences = re.split(r"(?<=[.;?]) ", answer)
        own = [part for part in sentences if not RELATIVE.search(part)]
        if i == 0:
            record["complaint"] = _first(COMPLAINT, DURATION.sub("", sentences[0]).replace("  ", " "))
        if i == 0 or topic == "duration":
            times = DURATION.findall(" ".join(part for part in sentences if not OTHER_TIME.search(part)))
            if times:
                number, unit = times[-1]
                record["duration"] = f"{NUMBERS.get(number, number)} {unit}"
        elif topic == "age":
            numbers = re.findall(r"\b\d{2,3}\b", " ".join(own))
            record["age"] = int(numbers[-1]) if numbers else None
            record["sex"] = "female" if WOMAN.search(" ".join(own)) else "male" if MAN.search(" ".join(own)) else None
        elif topic == "drug":
            taken = " ".join(part for part in sentences if not STOPPED.search(part))
            doses = re.findall(r"\b(\d+) (?:mg|milligram)", taken)
            names = [name for name in DRUG.findall(taken) if name not in NO_DRUG]
            record |= {"dose": f"{doses[-1]} mg", "drug": names[0] if names else None} if doses else {}
        elif topic == "allergy" and not DENIED.search(answer) and own:
            record["allergy"] = _first(ALLERGY, " ".join(own))
        elif topic == "symptom":
            record["denies"] = _denied(question, answer) or record["denies"]
    titles = lines[0] if lines else ""
    if WOMAN.search(titles) or MAN.search(titles):
        record["sex"] = "female" if WOMAN.search(titles) else "male"
    return record


def _first(pattern: re.Pattern, text: str) -> str | None:
    match = pattern.search(text)
    return match[1].strip() if match else None


def _denied(question: str, answer: str) -> str | None:
    """The symptom of the question that the answer denies."""
    asked = re.sub(
        r"^.*?\b(?:any|some|have|about|and|is there|did|also|come with it)\b (?:any |you have )?", "", question
    )
    asked = re.sub(r"(?: as well| too| come with it|, too)?[?.]$", "", asked).replace(",", "")
    symptoms = re.split(r" or (?:maybe )?| and ", asked)
    if len(symptoms) == 1:
        return symptoms[0] if DENIED.search(answer) else None
    for symptom in symptoms:
        name = re.escape(symptom)
        if re.search(rf"\b(?:no|never|without|not have|not had|no to) (?:any )?{name}|{name}, (?:no|never)[.]", answer):
            return symptom
    return None


def regex_baseline(questions: pd.DataFrame) -> pd.DataFrame:
    """Rows of variant, id, scoring, template and text, like those of `inference.predict`, for kind `record`."""
    rows = questions[questions.kind == "record"]
    form = templates.FORMS["record"]
    texts = [form.model_construct(**fill_form(dialogue)).model_dump_json() for dialogue in rows.question]
    return pd.DataFrame(
        {"variant": "regex", "id": rows.id, "scoring": "generated", "template": "record", "text": texts}
    )
