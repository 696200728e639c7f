"""Answers kept for the next time: by exact request, which is safe, and by similarity, which is studied and not offered.

The paper (arXiv 2505.00025) also serves stored answers of *similar* questions, α·Jaccard + (1−α)·cosine over a
threshold, and gives neither number. In medicine a question that differs in one word may have another answer: a child's
dose is not an adult's. So `ResponseCache` knows exact requests alone, and the rest of this module measures what the
similar ones would do: real questions and edits of them by written rules, each pair read and judged
(response_cache.csv). No model is loaded here; vectors are given.
"""

from __future__ import annotations

import re
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from medkit.duplicates import normalise
from medkit.params import digest
from medkit.statistics import wilson

# --- exact ---------------------------------------------------------------------------------------------------------


def cache_key(prompt_ids: Sequence[int], model_digest: str, settings: Mapping) -> str:
    """What names an answer: the rendered prompt's token ids, the model's digest and the generation settings.

    `settings` must hold everything else that changes the answer (its length limit, its end tokens), as json values.
    """
    return digest([model_digest, dict(settings), [int(i) for i in prompt_ids]])


class ResponseCache:
    """Whole answers of greedy engines, by `cache_key`; the least recently used goes first. For many threads.

    An answer takes about 300 bytes and four per token; the prompt is not kept. Two threads that miss the same key at
    once both generate it. Put no answer that was cut off: it would be served as a whole one.
    """

    def __init__(self, max_answers: int = 4096):
        if max_answers < 1:
            raise ValueError(f"max_answers is {max_answers}: give at least 1, or use no cache")
        self.max_answers, self.hits, self.misses = max_answers, 0, 0
        self._answers: OrderedDict[str, array] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> list[int] | None:
        """Token ids of the stored answer, a copy of its own; None, and a miss counted, where there is none."""
        with self._lock:
            if (found := self._answers.get(key)) is None:
                self.misses += 1
                return None
            self.hits += 1
            self._answers.move_to_end(key)
            return found.tolist()

    def put(self, key: str, token_ids: Sequence[int]) -> None:
        """Keep a whole answer, in place of an older one of that key."""
        with self._lock:
            self._answers[key] = array("i", token_ids)
            self._answers.move_to_end(key)
            if len(self._answers) > self.max_answers:
                self._answers.popitem(last=False)


# --- similar: the score --------------------------------------------------------------------------------------------


def jaccard(text_a: str, text_b: str) -> float:
    """Shared over all distinct words of two texts, case and punctuation apart; 1 if neither has a word."""
    a, b = set(normalise(text_a).split()), set(normalise(text_b).split())
    return len(a & b) / len(a | b) if a | b else 1.0


def similarity(jaccard, cosine, alpha: float):
    """The paper's score, α·Jaccard + (1−α)·cosine, of numbers or of columns."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}: the weight of the words, between 0 and 1")
    return alpha * jaccard + (1 - alpha) * cosine


# --- similar: edits of real questions by written rules -----------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """An edit by regular expression, in any case of letters; a match's capital is kept."""

    kind: str
    pattern: str
    replacement: str

    @property
    def name(self) -> str:
        return f"{self.pattern} → {self.replacement}"


# One line: a drug, a brand that holds it and nothing else, and another drug that is given for something else.
DRUGS = [
    line.split()
    for line in """
    acetaminophen tylenol warfarin
    albuterol proair metoprolol
    alendronate fosamax methotrexate
    alprazolam xanax gabapentin
    amiodarone cordarone levothyroxine
    amlodipine norvasc sertraline
    anastrozole arimidex prednisone
    apixaban eliquis insulin
    atorvastatin lipitor furosemide
    azithromycin zithromax diazepam
    bupropion wellbutrin lisinopril
    celecoxib celebrex clonidine
    cephalexin keflex digoxin
    ciprofloxacin cipro citalopram
    citalopram celexa tramadol
    clonazepam klonopin amoxicillin
    clopidogrel plavix metformin
    colchicine colcrys zolpidem
    desmopressin ddavp oxytocin
    diazepam valium allopurinol
    diclofenac voltaren phenytoin
    diltiazem cardizem fluconazole
    donepezil aricept omeprazole
    duloxetine cymbalta warfarin
    enoxaparin lovenox morphine
    escitalopram lexapro glipizide
    estradiol estrace tamoxifen
    finasteride proscar estradiol
    fluoxetine prozac propranolol
    fluticasone flonase naltrexone
    furosemide lasix fluoxetine
    gabapentin neurontin simvastatin
    glipizide glucotrol prednisone
    hydroxychloroquine plaquenil loratadine
    ibuprofen advil clopidogrel
    itraconazole sporanox omeprazole
    lamotrigine lamictal ibuprofen
    levofloxacin levaquin haloperidol
    levothyroxine synthroid amiodarone
    lisinopril zestril alprazolam
    loratadine claritin lorazepam
    lorazepam ativan losartan
    losartan cozaar lithium
    meloxicam mobic methadone
    memantine namenda spironolactone
    metformin glucophage ibuprofen
    methylphenidate ritalin metoprolol
    metoprolol lopressor methylphenidate
    metronidazole flagyl metoclopramide
    montelukast singulair risperidone
    naproxen aleve levetiracetam
    olanzapine zyprexa ondansetron
    omeprazole prilosec warfarin
    pantoprazole protonix isotretinoin
    paroxetine paxil penicillin
    phenytoin dilantin albuterol
    prednisone deltasone hydrochlorothiazide
    pregabalin lyrica atenolol
    quetiapine seroquel ranitidine
    ranitidine zantac carbamazepine
    rosuvastatin crestor trazodone
    sertraline zoloft nitroglycerin
    sildenafil viagra nitroglycerin
    simvastatin zocor codeine
    sitagliptin januvia sumatriptan
    tacrolimus prograf azithromycin
    tamsulosin flomax tamoxifen
    topiramate topamax methimazole
    tramadol ultram tamsulosin
    vancomycin vancocin gentamicin
    warfarin coumadin ibuprofen
    zolpidem ambien caffeine
    """.strip().splitlines()
]

# Two words that stand for each other: in rules of a kind that keeps the answer, or of one that changes it.
BOTH_WAYS = {
    "same: other spelling": """leukaemia/leukemia anaemia/anemia diarrhoea/diarrhea oedema/edema tumour/tumor
        oesophagus/esophagus haematoma/hematoma haemorrhage/hemorrhage haemorrhoids/hemorrhoids fibre/fiber""",
    "same: synonym": """heart_attack/myocardial_infarction high_blood_pressure/hypertension shingles/herpes_zoster
        chickenpox/varicella kidney_failure/renal_failure nappy_rash/diaper_rash whooping_cough/pertussis flu/influenza
        underactive_thyroid/hypothyroidism overactive_thyroid/hyperthyroidism fainting/syncope athlete's_foot/tinea_pedis
        tinnitus/ringing_in_the_ears kidney_stones/nephrolithiasis mini_stroke/transient_ischemic_attack
        cold_sores/herpes_labialis low_blood_sugar/hypoglycemia acid_reflux/gastroesophageal_reflux bedsores/pressure_ulcers
        lockjaw/tetanus pink_eye/conjunctivitis hives/urticaria eczema/atopic_dermatitis itching/pruritus""",
    "another person": """adults/children child/adult women/men woman/man female/male elderly/newborns baby/grandmother""",
    "negation": """with_surgery/without_surgery safe/dangerous normal/abnormal""",
    "direction": """high/low increase/decrease increases/decreases raise/lower start_taking/stop_taking before/after
        hyperthyroidism/hypothyroidism hyperglycemia/hypoglycemia hypertension/hypotension gain/loss""",
    "another form": """acute/chronic benign/malignant type_1/type_2 upper/lower""",
    "something else asked": """symptoms/causes treat/prevent""",
}
_BODY = r"(?= (?:upper|lower|arm|leg|hand|foot|knee|hip|shoulder|side|flank|eye|ear|breast|lung|kidney|ventric|atri))"
ONE_WAY = [
    Rule("same: other wording", r"^what is\b", "what's"),
    Rule("same: other wording", r"^what are the symptoms of\b", "what symptoms come with"),
    Rule("same: other wording", r"^how do you treat\b", "how is it best to treat"),
    Rule("same: other wording", r"^how do you\b", "how can I"),
    Rule("same: other wording", r"^can you\b", "is it possible to"),
    Rule("same: other wording", r"^how (?:do|can) i\b", "please tell me how to"),
    Rule("same: other wording", r"^(?:how do i|how do you) get rid of\b", "what gets rid of"),
    Rule("same: other wording", r"^what causes\b", "what is the reason for"),
    Rule("same: other wording", r"^is (.+) serious\?$", r"how serious is \1?"),
    Rule("same: other wording", r"^(what .*)\bmedication\b", r"\1medicine"),
    Rule("another person", r"^((?:what|how much)\b.*\bdos(?:e|age)\b.*?)\W*$", r"\1 for a child?"),
    Rule("another person", r"^((?:is it safe|can (?:i|you) take)\b.*?)\W*$", r"\1 during pregnancy?"),
    Rule("another person", r"\b([2-9])\d(?=[ -]years?[ -]old)", r"\1"),
    Rule("negation", r"\bleft untreated\b", "treated"),
    Rule("negation", r"\b(is|are|do|does|should|to|but|if|when|why) not\b", r"\1"),
    Rule("negation", r"\bshouldn't\b", "should"),
    Rule("negation", r"^(can you \w+)(?= .* with\b)", r"\1"),
    Rule("direction", r"\btoo much\b", "too little"),
    Rule("dose", r"\b(\d+)(?= ?mgs?\b)", r"\g<1>0"),
    Rule("dose", r"(?<=\d)( ?)mcg\b", r"\1mg"),
    Rule("dose", r"(?<=\d)( ?)mgs?\b", r"\1g"),
    Rule("another form", rf"\bleft\b{_BODY}", "right"),
    Rule("another form", rf"\bright\b{_BODY}", "left"),
]
EXAM_RULES = [
    Rule("exam: most to least", r"\bmost (likely|appropriate|common)\b(?=[^.?]*\?\s*$)", r"least \1"),
    Rule("exam: left and right", rf"\bleft\b{_BODY}", "right"),
    Rule("exam: left and right", rf"\bright\b{_BODY}", "left"),
]


def _word(words: str) -> str:
    return rf"\b{re.escape(words)}\b"


def open_rules() -> list[Rule]:
    """All rules for short questions: ONE_WAY, BOTH_WAYS in each direction, and the drugs."""
    pairs = [
        (kind, pair.replace("_", " ").split("/"))
        for kind, listed in BOTH_WAYS.items()
        for pair in listed.split()
    ]
    swaps = [Rule(kind, _word(a), b) for kind, pair in pairs for a, b in (pair, pair[::-1])]
    for generic, brand, other in DRUGS:
        swaps += [Rule("same: brand name", _word(a), b) for a, b in ((generic, brand), (brand, generic))]
        swaps += [Rule("another drug", _word(name), other) for name in (generic, brand)]
    return [*ONE_WAY, *swaps]


def edit(text: str, rule: Rule) -> str | None:
    """The text after the rule, everywhere it holds; None where it does not hold."""

    def replace(found: re.Match) -> str:
        new = found.expand(rule.replacement)
        return new[0].upper() + new[1:] if new and found[0][:1].isupper() else new

    new = re.sub(rule.pattern, replace, text, flags=re.IGNORECASE)
    return None if new == text else new
