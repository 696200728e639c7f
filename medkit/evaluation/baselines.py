"""Baselines without a language model, which a model must beat to have learned more than a table of words could hold.

For questions: the most frequent answer, and TF-IDF with logistic regression, on the student's labelled rows. For exams,
which have no labelled rows: always the longest option, and always the first. For records of the first form: regular
expressions, written by reading the phrases of the training pool alone.
"""

import re

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline, make_union

from medkit.prompts import templates


def predict_baselines(training: pd.DataFrame, questions: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, int]]:
    """The baselines' scores of the questions' options, and what each baseline weighs in bytes.

    training, questions: rows with `question`, `options` and `answer` (an index into `options`). An answer is a class,
    so the options must come from one list, as the chapters of ICD-10-CM do and those of an exam do not. Returns rows
    like those of `inference.predict`: variant, id, scoring (`option_text`), `logprobs`, one per option, in nats, and
    `answer_tokens`, all 1. An option that no training row had as its answer has half of the smallest probability.
    """
    answers = [options[answer] for options, answer in zip(training.options, training.answer, strict=True)]
    classes, counts = np.unique(answers, return_counts=True)
    probabilities = {"majority": np.tile(counts / counts.sum(), (len(questions), 1))}
    sizes = {"majority": counts.nbytes}
    if len(classes) > 1:  # else there is nothing to tell apart
        words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
        characters = TfidfVectorizer(sublinear_tf=True, analyzer="char_wb", ngram_range=(3, 5))
        model = make_pipeline(make_union(words, characters), LogisticRegression(C=10.0, max_iter=1000))
        model.fit(training.question.tolist(), answers)
        probabilities["tfidf"] = model.predict_proba(questions.question.tolist())
        sizes["tfidf"] = count_bytes(model)
    rows = []
    for name, table in probabilities.items():
        least = table[table > 0].min() / 2
        for id, options, row in zip(questions.id, questions.options, table, strict=True):
            of_class = dict(zip(classes, row, strict=True))
            logprobs = np.log([of_class.get(option, least) for option in options])
            rows.append({"variant": name, "id": id, "logprobs": logprobs})
    return _as_predictions(pd.DataFrame(rows)), sizes


def predict_by_rule(questions: pd.DataFrame) -> pd.DataFrame:
    """What two rules choose that read no question: the first option, and the longest in characters. Rows as above."""
    choices = {
        "first": [[1.0, *(0.0 for _ in options[1:])] for options in questions.options],
        "longest": [[float(len(option)) for option in options] for options in questions.options],
    }
    tables = (pd.DataFrame({"variant": name, "id": questions.id, "logprobs": rows}) for name, rows in choices.items())
    return _as_predictions(pd.concat(tables, ignore_index=True))


def _as_predictions(scores: pd.DataFrame) -> pd.DataFrame:
    """An option counts as one token, so that its sum and its mean per token are the same."""
    return scores.assign(scoring="option_text", answer_tokens=scores.logprobs.map(lambda each: [1] * len(each)))


def count_bytes(model: Pipeline) -> int:
    """Bytes of the coefficients as 32-bit floats, of the inverse document frequencies, and of the vocabulary."""
    features, classifier = model
    parts = [part for _, part in features.transformer_list]
    words = sum(len(word.encode()) for part in parts for word in part.vocabulary_)
    return 4 * (classifier.coef_.size + sum(len(part.vocabulary_) for part in parts)) + words


# --- records, by regular expressions ---------------------------------------------------------------------------------

NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
DURATION = re.compile(rf"\b(\d+|{'|'.join(NUMBERS)}) ((?:day|week|month|year)s?)\b")
RELATIVE = re.compile(r"\b(?:my|the family, my) (?:\w+)\b.*\b(?:has|had|got|gets|is|at|with|reacts|cannot)\b")
OTHER_TIME = re.compile(r"\b(?:worse|worst|stopped|visit|trip|slept|last)\b")
STOPPED = re.compile(
    r"\b(?:stop(?:ped)?|before that|no longer|replaced|used to(?! be)|off|did not help|ended|my old|finished|quit|past|"
    r"gave up|no more|any more|dropped|history|until|earlier|crossed out|not now)\b"
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
DRUG = re.compile(r"(?:^|\b(?:take|of|on|me|is|are|yes,|forgot,|just|present|use|my|only|said|wrote) )([a-z]{5,})\b")
NO_DRUG = {"doctor", "every", "about", "after", "daily", "taking", "nothing", "there", "which", "since", "tablets"}
ALLERGY = re.compile(
    r"(?:\b(?:to(?! stay)|from|with|after|avoid|stand) |^yes, (?!i\b|to\b)|^(?=[a-z ]+ makes))(?:the )?"
    r"([a-z ]+?)(?= i\b| makes\b|[.,;]|$)"
)
DENIED = re.compile(r"\b(?:no|(?<!could )not|none|never|without|nothing)\b")
WOMAN = re.compile(r"\b(?:mrs|ms|ma'am|woman|(?:grand)?mother)\b")
MAN = re.compile(r"\b(?:mr|sir|man|(?:grand)?father)\b")


def regex_baseline(questions: pd.DataFrame) -> pd.DataFrame:
    """Rows of variant, id, scoring, template and text, like those of `inference.predict`, for kind `record`."""
    rows = questions[questions.kind == "record"]
    form = templates.FORMS["record"]
    texts = [form.model_construct(**fill_form(dialogue)).model_dump_json() for dialogue in rows.question]
    return pd.DataFrame(
        {"variant": "regex", "id": rows.id, "scoring": "generated", "template": "record", "text": texts}
    )


def fill_form(dialogue: str) -> dict:
    """The fields of the first form in a dialogue with a line per turn, `D: …` and `P: …`.

    The doctor's question names the topic, the patient's next line answers it. Sentences about relatives, about drugs
    that were stopped and about other times are left out.
    """
    record = dict.fromkeys(templates.FORMS["record"].model_fields)
    lines = [line[3:].casefold() for line in dialogue.splitlines()]
    for i, (question, answer) in enumerate(zip(lines[::2], lines[1::2], strict=False)):
        topic = next((name for name, pattern in TOPICS.items() if re.search(pattern, question)), "symptom")
        sentences = re.split(r"(?<=[.;?]) ", answer)
        about_patient = " ".join(part for part in sentences if not RELATIVE.search(part))
        if i == 0:
            record["complaint"] = _first(COMPLAINT, DURATION.sub("", sentences[0]).replace("  ", " "))
        if i == 0 or topic == "duration":
            times = DURATION.findall(" ".join(part for part in sentences if not OTHER_TIME.search(part)))
            if times:
                number, unit = times[-1]
                record["duration"] = f"{NUMBERS.get(number, number)} {unit}"
        elif topic == "age":
            numbers = re.findall(r"\b\d{2,3}\b", about_patient)
            record["age"] = int(numbers[-1]) if numbers else None
            record["sex"] = "female" if WOMAN.search(about_patient) else "male" if MAN.search(about_patient) else None
        elif topic == "drug":
            taken = " ".join(part for part in sentences if not STOPPED.search(part))
            doses = re.findall(r"\b(\d+) (?:mg|milligram)", taken)
            names = [name for name in DRUG.findall(taken) if name not in NO_DRUG]
            record |= {"dose": f"{doses[-1]} mg", "drug": names[0] if names else None} if doses else {}
        elif topic == "allergy" and not DENIED.search(answer) and about_patient:
            record["allergy"] = _first(ALLERGY, about_patient)
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
        r"^.*?\b(?:any|some|have|about|and|is there|is it|is|are|did|also|come with it)\b "
        r"(?:any |you (?:have|had|notice) )?", "", question
    )  # fmt: skip
    asked = re.sub(r"(?: as well| too| come with it|, too| a problem|, both)?[?.]$", "", asked)
    symptoms = re.split(r",? or (?:maybe )?| and |, ", asked)
    if len(symptoms) == 1:
        return symptoms[0] if DENIED.search(answer) else None
    for symptom in symptoms:
        name = re.escape(symptom)
        denied = rf"\b(?:no|never|without|not|not have|not had|no to|not from) (?:any )?{name}"
        if re.search(rf"{denied}|{name},? (?:no|never|does not|not)(?=[.,]| at all)", answer):
            return symptom
    return None
