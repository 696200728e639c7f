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
from functools import cache, partial
from pathlib import Path
from threading import Lock

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from medkit.data.drug_names import DRUGS
from medkit.data.near_duplicates import normalise
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


# --- similar: edits of real questions by written rules ---------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """An edit by regular expression, in any case of letters; a match's capital is kept."""

    kind: str
    pattern: str
    replacement: str

    @property
    def name(self) -> str:
        return f"{self.pattern} → {self.replacement}"


# Two words that stand for each other, in kinds that keep the answer ("same: …") and in kinds that change it.
BOTH_WAYS = {
    "same: spelling": """leukaemia/leukemia anaemia/anemia diarrhoea/diarrhea oedema/edema tumour/tumor
        oesophagus/esophagus haematoma/hematoma haemorrhage/hemorrhage haemorrhoids/hemorrhoids""",
    "same: synonym": """heart_attack/myocardial_infarction shingles/herpes_zoster chickenpox/varicella flu/influenza
        nappy_rash/diaper_rash whooping_cough/pertussis underactive_thyroid/hypothyroidism
        overactive_thyroid/hyperthyroidism fainting/syncope athlete's_foot/tinea_pedis tinnitus/ringing_in_the_ears
        kidney_stones/nephrolithiasis mini_stroke/transient_ischemic_attack low_blood_sugar/hypoglycemia
        tetanus/lockjaw hives/urticaria itching/pruritus conjunctivitis/pink_eye""",
    "another person": """adults/children child/adult women/men woman/man female/male elderly/newborns""",
    "negation": """with_surgery/without_surgery safe/dangerous normal/abnormal""",
    "direction": """high/low increase/decrease raise/lower start_taking/stop_taking before/after weight_gain/weight_loss
        hyperthyroidism/hypothyroidism hyperglycemia/hypoglycemia""",
    "another form": "acute/chronic benign/malignant type_1/type_2",
    "something else asked": "treat/prevent",
}
_UPPER = r"(?= (?:eyelid|gi|back|abdom|limb|jaw|lip))"
_UNIT = r"(?= ?(?:mgs?|mcg|ml|ius?|units?)\b)"
_NOT_OF_BLOOD = "(?<!intracranial )(?<!pulmonary )"
_NOBODY = r"(?!.*\b(?:child|children|kids?|adults?|baby|pregnan\w*|old|year)\b)"
ONE_WAY = [
    Rule("same: wording", r"^what is\b", "what's"),
    Rule("same: wording", r"^what are the symptoms of\b", "what symptoms come with"),
    Rule("same: wording", r"^how do you\b", "how can I"),
    Rule("same: wording", r"^can you\b", "is it possible to"),
    Rule("same: wording", r"^how (?:do|can) i\b", "please tell me how to"),
    Rule("same: wording", r"^how (?:do|can) (?:i|you) get rid of\b", "what gets rid of"),
    Rule("same: wording", r"^what causes\b", "what is the reason for"),
    Rule("same: wording", r"^is ((?!.* (?:very|a)\b).+) serious\?$", r"how serious is \1?"),
    Rule("same: wording", r"^(what .*)\bmedication\b", r"\1medicine"),
    Rule("same: synonym", rf"{_NOT_OF_BLOOD}\bhypertension\b", "high blood pressure"),
    Rule("same: synonym", r"\bhigh blood pressure\b", "hypertension"),
    Rule("another person", rf"^{_NOBODY}((?:what|how much)\b.*\bdos(?:e|age)\b.*?)\W*$", r"\1 for a child?"),
    Rule("another person", rf"^{_NOBODY}((?:is it safe|can (?:i|you) take)\b.*?)\W*$", r"\1 during pregnancy?"),
    Rule("another person", r"\b([2-9])\d(?=[ -]years?[ -]old)", r"\1"),
    Rule("negation", r"\bleft untreated\b", "treated"),
    Rule("negation", r"\b(is|are|do|does|should|to|but|if|when|why) not\b", r"\1"),
    Rule("negation", r"\bshouldn't\b", "should"),
    Rule("direction", r"\btoo much\b", "too little"),
    Rule("direction", rf"{_NOT_OF_BLOOD}\bhypertension\b", "hypotension"),
    Rule("dose", rf"(?<![\d.,-])(\d+){_UNIT}", r"\g<1>0"),
    Rule("dose", rf"(?<![\d.,-])([1-9]\d*)0{_UNIT}", r"\1"),
    Rule("another form", rf"\bupper\b{_UPPER}", "lower"),
    Rule("something else asked", r"^(what (?:are|is) (?:the )?)symptoms(?= of\b)", r"\1causes"),
    Rule("something else asked", r"^(what (?:are|is) (?:the )?)causes(?= of\b)", r"\1symptoms"),
    Rule("something else asked", r"^what causes\b", "what cures"),
]
EXAM_RULES = [Rule("exam: most, least", r"\bmost (likely|appropriate|common)\b(?=[^.?]*\?\s*$)", r"least \1")]
EXAM_BRANDS = "same: exam, brand name"
# Read and dropped: left ↔ right (the drug that an exam asks for never depended on it) and mg → g (no such tablet).
_COMPARES = r"\bdifferen\w+|\bvs\b|\bversus\b|\bsame\b|\bcompared?\b"


def open_rules() -> list[Rule]:
    """All rules for questions without options: ONE_WAY, BOTH_WAYS in each direction, and the drugs."""
    rules = list(ONE_WAY)
    for kind, listed in BOTH_WAYS.items():
        for pair in listed.split():
            a, b = pair.replace("_", " ").split("/")
            rules += [Rule(kind, _word(a), b), Rule(kind, _word(b), a)]
    for generic, brand, other in DRUGS:
        rules += [Rule("same: brand name", _word(generic), brand), Rule("same: brand name", _word(brand), generic)]
        rules += [Rule("another drug", _word(name), other) for name in (generic, brand)]
    return rules


def _word(words: str) -> str:
    return rf"\b{re.escape(words)}\b"


def edit(text: str, rule: Rule) -> str | None:
    """The text after the rule, everywhere it holds; None where it does not hold, or the question compares two things.

    (The new word stands there already, or the question is about a difference.)
    """

    def replace(found: re.Match) -> str:
        new = found.expand(rule.replacement)
        return new[0].upper() + new[1:] if new and found[0][:1].isupper() else new

    new = re.sub(rule.pattern, replace, text, flags=re.IGNORECASE)
    both = _COMPARES if "\\" in rule.replacement else rf"{_COMPARES}|{_word(rule.replacement)}"
    return None if new == text or re.search(both, text, re.IGNORECASE) else new


# --- similar: the pairs ----------------------------------------------------------------------------------------------

PAIR_COLUMNS = ["pair", "id", "other", "kind", "text_a", "text_b"]
ALL_EDITS = "all edits"
REAL_SAME, REAL_OTHER = "same: two real questions", "two real questions"
VERDICT_FILE = Path(__file__).with_name("similar_answers.csv")
EXAM_CHARACTERS = 700  # what the encoder reads whole: beyond its 256 tokens an edit would be invisible
NEAR = 0.75  # every lookup of a question above this similarity at α = ½ was read, below it a sample


def study_pairs(open_questions: pd.DataFrame, drug_pairs: pd.DataFrame) -> pd.DataFrame:
    """Every pair of the study: PAIR_COLUMNS, `drawn` (rule, random or near), `lookups` and `verdict`.

    Edits were drawn by `draw_edits`. Real pairs are an open question and the other one most similar to it (α = ½,
    all-MiniLM-L6-v2): 119 at `random`, and all that are at least NEAR; `lookups` says for how many questions the other
    one is it. `verdict`, by one reader: `same` if the right answer to either is right for the other (how many signs or
    types are asked for apart), `different`, or `unclear`, where that holds one way only or the edit makes no sense.
    Pairs that nobody read, because the data or the rules changed, are missing.
    """
    read = pd.read_csv(VERDICT_FILE, keep_default_na=False)
    texts = open_questions.set_index("id").question
    real = read[(read.drawn != "rule") & read.id.isin(texts.index) & read.other.isin(texts.index)]
    real = real[["id", "other", "kind"]].assign(text_a=real.id.map(texts), text_b=real.other.map(texts))
    real["pair"] = [_pair(a, b) for a, b in zip(real.text_a, real.text_b, strict=True)]
    edits = [
        make_edits(open_questions[open_questions.id.isin(read.id)], open_rules()),
        make_edits(drug_pairs[drug_pairs.id.isin(read.id)], EXAM_RULES),
        brand_pairs(drug_pairs[drug_pairs.id.isin(read.id)]),
    ]
    table = pd.concat([*edits, real[PAIR_COLUMNS]], ignore_index=True)
    table = table.merge(read[["pair", "kind", "drawn", "lookups", "verdict"]], on=["pair", "kind"])
    found = np.where(table.verdict == "same", REAL_SAME, REAL_OTHER)
    return table.assign(kind=table.kind.where(table.drawn == "rule", found))


def make_edits(questions: pd.DataFrame, rules: Sequence[Rule]) -> pd.DataFrame:
    """Pairs (PAIR_COLUMNS) of each question and what each rule makes of it; `other` names the rule."""
    rows = [
        (_pair(text, new), name, rule.name, rule.kind, text, new)
        for rule in rules
        for name, text in zip(questions.id, questions.question, strict=True)
        if (new := edit(text, rule))
    ]
    return pd.DataFrame(rows, columns=PAIR_COLUMNS).drop_duplicates(["kind", "pair"])


def draw_edits(edits: pd.DataFrame, per_rule: int = 12, per_kind: int = 32) -> pd.DataFrame:
    """At most so many of a rule and of a kind, each question once per kind: the ones to read.

    Which ones is a matter of hashes, and so of no order. (Of exams: 16 and 16, shorter than EXAM_CHARACTERS.)
    """
    few = edits.sort_values("pair").groupby(["kind", "other"]).head(per_rule).drop_duplicates(["kind", "id"])
    return few.groupby("kind").head(per_kind).sort_values(["kind", "pair"], ignore_index=True)


def brand_pairs(drug_pairs: pd.DataFrame) -> pd.DataFrame:
    """Exam questions under two names of their drugs, where every change is one of DRUGS; `other` tells the changes.

    The rest of the data set's swaps is left out: many of its brands hold a second drug, or another one.
    """
    known = {(generic, brand) for generic, brand, _ in DRUGS}
    rows = []
    for row in drug_pairs.itertuples():
        before, after = normalise(row.question).split(), normalise(row.question_swapped).split()
        changes = {(a, b) for a, b in zip(before, after, strict=False) if a != b}
        if changes and len(before) == len(after) and changes <= known:
            told = ", ".join(f"{a} → {b}" for a, b in sorted(changes))
            pair = _pair(row.question, row.question_swapped)
            rows.append((pair, row.id, told, EXAM_BRANDS, row.question, row.question_swapped))
    return pd.DataFrame(rows, columns=PAIR_COLUMNS).drop_duplicates("pair")


def _pair(text_a: str, text_b: str) -> str:
    """A verdict belongs to these very texts."""
    return digest([text_a, text_b])[:10]


# --- similar: what serving them would do -----------------------------------------------------------------------------

THRESHOLDS = tuple(round(0.5 + 0.01 * step, 2) for step in range(51))
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def measured_pairs(pairs: pd.DataFrame, texts: Sequence[str], vectors: np.ndarray) -> pd.DataFrame:
    """Pairs that were judged, with `jaccard`, `cosine` and `same_answer`; unclear ones are left out.

    So are edits that did not do what their rule is for. `vectors` holds a unit vector for each of the texts.
    """
    row = {text: number for number, text in enumerate(texts)}
    kept = pairs[(pairs.verdict != "unclear") & (pairs.kind.str.startswith("same") == (pairs.verdict == "same"))]
    a, b = (vectors[kept[column].map(row).to_numpy(int)] for column in ("text_a", "text_b"))
    words = [jaccard(x, y) for x, y in zip(kept.text_a, kept.text_b, strict=True)]
    cosine = np.minimum((a * b).sum(axis=1), 1)
    return kept.assign(same_answer=kept.verdict == "same", jaccard=words, cosine=cosine).reset_index(drop=True)


def rates(pairs: pd.DataFrame, thresholds: Sequence[float], alphas: Sequence[float], confidence: float) -> pd.DataFrame:
    """A row per α, threshold, measure and kind: rate, its Wilson interval, n pairs.

    `hit_rate`    of pairs with the same answer, the share that is served (similarity at least the threshold)
    `wrong_rate`  of pairs with different answers, the share that is served all the same
    `wrong_share` of the edits served, those with different answers; it depends on how many of which were tried

    Of each kind, and of ALL_EDITS. Of the real pairs those count that were drawn at random: the near ones are for
    `lookups`.
    """
    pairs = pairs[pairs.drawn != "near"]
    same, rows = pairs.same_answer.to_numpy(), []
    edits = (pairs.drawn == "rule").to_numpy()
    kinds = {kind: (pairs.kind == kind).to_numpy() for kind in pairs.kind.unique()} | {ALL_EDITS: edits}
    interval = cache(partial(wilson, confidence=confidence))
    for alpha in alphas:
        score = similarity(pairs.jaccard, pairs.cosine, alpha).to_numpy()
        for threshold in thresholds:
            served = score >= threshold
            asked = [("hit_rate", kind, of_kind & same, served) for kind, of_kind in kinds.items()]
            asked += [("wrong_rate", kind, of_kind & ~same, served) for kind, of_kind in kinds.items()]
            asked += [("wrong_share", ALL_EDITS, edits & served, ~same)]
            for measure, kind, among, counted in asked:
                if n := int(among.sum()):
                    count = int((among & counted).sum())
                    rows.append((alpha, threshold, measure, kind, count / n, *interval(count, n), n))
    columns = ["alpha", "threshold", "measure", "kind", "rate", "ci_low", "ci_high", "n"]
    return pd.DataFrame(rows, columns=columns)


def lookups(pairs: pd.DataFrame, thresholds: Sequence[float], questions: int, confidence: float) -> pd.DataFrame:
    """If each of so many real questions met a cache of all the others (α = ½): what would be served, and what wrong.

    A row per threshold, NEAR or more: `hit_rate` of the questions, `wrong_share` of the pairs served (two questions
    that are each other's nearest are one pair) with its Wilson interval, n pairs. What is unclear counts nowhere.
    """
    if min(thresholds) < NEAR:
        raise ValueError(f"threshold {min(thresholds)}: below {NEAR} only a sample of the lookups was read")
    real = pairs[pairs.kind.isin([REAL_SAME, REAL_OTHER])]
    score, rows = similarity(real.jaccard, real.cosine, 0.5), []
    for threshold in thresholds:
        served = real[score >= threshold]
        wrong, n = int((~served.same_answer).sum()), len(served)
        share = (wrong / n, *wilson(wrong, n, confidence)) if n else (np.nan, 0.0, 1.0)
        rows.append((threshold, served.lookups.sum() / questions, *share, n))
    return pd.DataFrame(rows, columns=["threshold", "hit_rate", "wrong_share", "ci_low", "ci_high", "n"])


def best_thresholds(table: pd.DataFrame, pairs: pd.DataFrame, most_wrong: float) -> pd.DataFrame:
    """What the best threshold of each α is worth, if of the edits with another answer at most `most_wrong` are served.

    `threshold` is the lowest of the table's that keeps to it (NaN: none does), `hit_rate` what it leaves of the edits
    with the same answer, `worst_kind` and `worst_rate` what it still serves wrongly. `auc_edits` and `auc_real` (drawn
    at random) are the areas under the curve of telling the same answer by similarity; ½ is a coin.
    """
    rows = []
    for alpha, of_alpha in table.groupby("alpha"):
        auc = [
            roc_auc_score(some.same_answer, similarity(some.jaccard, some.cosine, alpha))
            for some in (pairs[pairs.drawn == "rule"], pairs[pairs.drawn == "random"])
        ]
        wrong = of_alpha[of_alpha.measure == "wrong_rate"].set_index("threshold")
        of_all = wrong.rate[wrong.kind == ALL_EDITS]
        threshold = of_all.index[of_all <= most_wrong].min()
        at = of_alpha[(of_alpha.threshold == threshold) & (of_alpha.measure == "hit_rate")]
        worst = wrong[(wrong.index == threshold) & (wrong.kind != ALL_EDITS)].nlargest(1, "rate")
        hit = at.rate[at.kind == ALL_EDITS].max()
        rows.append((alpha, *auc, threshold, hit, worst.kind.max(), worst.rate.max()))
    columns = ["alpha", "auc_edits", "auc_real", "threshold", "hit_rate", "worst_kind", "worst_rate"]
    return pd.DataFrame(rows, columns=columns)
