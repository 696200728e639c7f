"""The problem type of a question, which picks its prompt template: by keywords as in the paper, and learned.

The paper (arXiv 2505.00025) names five types and counts keywords, argmax_c Σ_w 1[w ∈ K_c]; it publishes neither its
lists nor its accuracy. Both classifiers here are measured on the same questions, labelled by hand (docs/labelling.md);
the one that is not of the paper learns from embeddings and is graded out of fold. No model is loaded here.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse.csgraph import connected_components
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score, confusion_matrix, f1_score, precision_recall_fscore_support
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from threadpoolctl import threadpool_limits  # comes with scikit-learn

from medkit.data.near_duplicates import group_near_duplicates
from medkit.stage import MedkitError
from medkit.statistics import paired_difference, wilson

PROBLEMS = ("medication", "diagnosis", "treatment", "prevention", "emergency")
OTHER = "other"  # definitions, prognosis, anatomy: the paper has no such type
LABELS = (*PROBLEMS, OTHER)
PRECEDENCE = ("emergency", "medication", "prevention", "treatment", "diagnosis")  # of equal counts, as in the labelling
LABEL_FILE = Path(__file__).with_name("problem_types.csv")
SCOPES = ("random", "random, five types", "with enrichment")
FOLDS, INNER_FOLDS = 5, 3
GRID = {"C": [0.1, 1.0, 10.0, 100.0], "class_weight": [None, "balanced"]}
SAME_COSINE = 0.9  # questions too short to share a run of eight words are copies if their embeddings are so near


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Written before the labelled questions were read, from the words of the open questions that are not in the sample.
KEYWORDS: dict[str, frozenset[str]] = {
    "medication": _words("""
        acetaminophen actonel adderall additive albuterol allopurinol amphetamine anastrozole antacid antacids
        antibiotic antibiotics antidepressant antidepressants antihistamine apap aspirin ativan azathioprine
        benzodiazepines benzonatate botulinum brand brimonidine bumetanide buprenorphine bupropion butalbital bystolic
        cannabis capsule capsules carvedilol celebrex cephalexin chemo cialis cipro citalopram clonidine cocaine codeine
        colchicine concerta contraceptive contraceptives coreg coumadin cyclosporine cymbalta dextroamphetamine
        dicyclomine dilantin dilaudid diltiazem diuretic diuretics divalproex docusate donepezil dosage dosages dose
        doses dosing doxepin drug drugs dulera ecstasy effexor eliquis epinephrine estradiol estrogen expired ezetimibe
        fentanyl finasteride flomax fluorouracil fluvoxamine gabapentin gardasil gemfibrozil generic glargine glipizide
        glucagon glucosamine guaifenesin gummies herceptin heroin humira hydrochloride ibuprofen inactive ingested
        ingredient ingredients inhaler inject injection injections insulin interact interaction interactions ivermectin
        keflex ketorolac lactulose lamotrigine lantus lasix levaquin levothyroxine lexapro lipitor lithium loratadine
        lotensin lotion lyrica magnesium marijuana mcg med medication medications medicine medicines medrol meds
        melatonin meloxicam memantine mercaptopurine metamucil metformin methotrexate mg mgs milligram milligrams
        miralax ml morphine naltrexone naproxen narcan narcotic nicotine nitrofurantoin nitroglycerin norco norvasc
        nsaid nsaids ointment olanzapine opiates opioid opioids otc oxybutynin oxycontin painkiller painkillers
        paracetamol percocet peroxide pharmacy phentermine phenytoin pill pills placebo plavix pramipexole prednisone
        premarin prescribe prescribed prescription prevnar proair probiotic prozac raloxifene refill restoril ropinirole
        senna seroquel shingrix shot spiriva spironolactone statins steroid steroids strength suboxone substitute
        sulfate supplement supplements suppository synthroid syringe tablet tablets taken taking tamiflu taper tdap
        tegretol testosterone thinner thinners topamax topiramate tramadol trazodone tretinoin trimethoprim tylenol
        vaccine vaccines valium valproic vicodin vitamin vitamins vyvanse warfarin wean withdrawal xanax xarelto
        zithromax zostavax zoster
    """),
    "diagnosis": _words("""
        appear appearance biopsy cause caused causes causing detect detected diagnose diagnosed diagnosing diagnosis
        differ difference differentiate distinguish feel feels felt identify indicate indicates know look looks mean
        means mimic mistaken mri normal reason reasons recognise recognize results sign signs suspect symptom symptoms
        tell test tested testing tests trigger triggered triggers why xray
    """),
    "treatment": _words("""
        calm clear cope correct corrected curable cure cured cures deal diet ease eat exercise exercises fix fixed foods
        heal help helps home improve manage managed management massage operation physiotherapy procedure recover
        recovery reduce reduced regain relief relieve relieved remedies remedy removal remove removed repair reverse
        reversed rid soothe stop surgery therapies therapy treat treatable treated treating treatment treatments treats
    """),
    "prevention": _words("""
        avoid avoided avoiding coming immune immunisation immunise immunity immunization keep lower prevent preventable
        preventative prevented preventing prevention preventive prevents prophylaxis protect protected protection
        recurrence screened screening vaccinated vaccination
    """),
    "emergency": _words("""
        ambulance bite bitten choke choking concern concerned cpr doctor doctors drown drowning emergency er gp hospital
        immediate immediately overdose poison poisoned poisoning resuscitate sting suicidal suicide swallowed
        unconscious urgent urgently worried worry worrying
    """),
}
# Stems of International Nonproprietary Names (WHO, "The use of stems in the selection of INN"), as endings that no
# ordinary word has: longer than the stem where the stem alone would catch one (-terol and cholesterol).
DRUG_NAME = re.compile(
    r"cef\w+|sulfa\w+|\w{2,}(afil|[ae]racetam|arone|a[sz]one|isone|azepam|azepine|azine|azole|azosin|barbital|bicin|"
    r"buterol|meterol|caine|cillin|c[iy]clovir|codone|coxib|cycline|dipine|dopa|dronate|dronic|fenac|fibrate|floxacin|"
    r"formin|gabalin|gliflozin|gliptin|glitazone|glutide|grel|grelor|lafaxine|lukast|mab|micin|mycin|morphone|nib|olol|"
    r"olone|onide|oxacin|oxetine|parin|platin|pramine|pril|profen|prost|sartan|semide|setron|statin|stigmine|taxel|"
    r"thiazide|tidine|traline|triptan|triptyline|tropium|vir|vudine|xaban|zolam)"
)


class ProblemError(MedkitError):
    """Labels or embeddings that do not belong to the questions; the message names the cure."""


def count_keywords(question: str) -> dict[str, int]:
    """Words of the question that each type's list holds; a repeated word counts again, as in the paper's sum."""
    words = re.findall(r"[a-z]+", question.casefold())
    return {
        problem: sum(w in listed or (problem == "medication" and bool(DRUG_NAME.fullmatch(w))) for w in words)
        for problem, listed in KEYWORDS.items()
    }


def classify_by_keywords(question: str) -> str:
    """The type with the most keywords; among equals the first in PRECEDENCE; `other` where no keyword occurs.

    The paper's argmax has no answer of its own for a question without keywords: it would be the first type listed.
    """
    counts = count_keywords(question)
    best = max(PRECEDENCE, key=counts.__getitem__)  # max keeps the first of equals
    return best if counts[best] else OTHER


def read_labels() -> pd.DataFrame:
    """The labels that come with the package: (id, source, label, second_label, drawn).

    `drawn` is random (the sample that accuracy is stated on) or enriched (found by reading further questions for the
    two rarest types). `second_label` is "" where the question was read once.
    """
    return pd.read_csv(LABEL_FILE, keep_default_na=False)


def join_labels(open_questions: pd.DataFrame) -> pd.DataFrame:
    """The labels with their question text, from a table (id, source, question) as `readers.read_open_questions` gives.

    The texts are not stored here: the id holds a digest of each. Raises ProblemError if one is not in the table.
    """
    labels = read_labels()
    missing = sorted(set(labels.id) - set(open_questions.id))
    if missing:
        raise ProblemError(f"{len(missing)} labelled questions are not there, first {missing[0]}; use the pinned wheel")
    return labels.merge(open_questions[["id", "question"]], on="id", validate="one_to_one")


def agreement(labels: pd.DataFrame) -> dict[str, float]:
    """Of the questions labelled twice: n, share labelled the same, and Cohen's kappa (chance-corrected agreement)."""
    twice = labels[labels.second_label != ""]
    same = (twice.label == twice.second_label).mean()
    return {"n": len(twice), "same": float(same), "kappa": float(cohen_kappa_score(twice.label, twice.second_label))}


def group_questions(questions: pd.Series, embeddings: np.ndarray) -> np.ndarray:
    """Component number per question: near-duplicates by words, or by a cosine of at least SAME_COSINE."""
    by_words = group_near_duplicates(questions)
    return connected_components((by_words[:, None] == by_words) | (embeddings @ embeddings.T >= SAME_COSINE))[1]


def _folds(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")  # the folds are made all the same
        return list(splitter.split(labels, labels, groups))


def fit_classifier(embeddings: np.ndarray, labels: Sequence[str], groups: np.ndarray, seed: int) -> LogisticRegression:
    """Logistic regression on unit vectors, refitted on all rows with the best of GRID by accuracy on inner folds."""
    labels = np.asarray(labels)
    folds = _folds(labels, groups, INNER_FOLDS, seed)
    search = GridSearchCV(LogisticRegression(max_iter=2000), GRID, scoring="accuracy", cv=folds)
    with threadpool_limits(1):  # the matrices are small: threads wait for each other longer than they work
        return search.fit(embeddings, labels).best_estimator_


def cross_validate(
    embeddings: np.ndarray, labels: Sequence[str], groups: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Per question: the learned label and the majority label, by models that saw neither it nor its group."""
    labels = np.asarray(labels)
    if not len(embeddings) == len(labels) == len(groups):
        raise ProblemError(f"{len(embeddings)} embeddings, {len(labels)} labels, {len(groups)} groups: give one each")
    learned, majority = np.empty(len(labels), object), np.empty(len(labels), object)
    for train, test in _folds(labels, groups, FOLDS, seed):
        model = fit_classifier(embeddings[train], labels[train], groups[train], seed)
        learned[test] = model.predict(embeddings[test])
        majority[test] = pd.Series(labels[train]).mode()[0]
    return learned, majority


@dataclass(frozen=True)
class Comparison:
    """Both classifiers and the majority label on the same questions, as tidy tables."""

    predictions: pd.DataFrame
    """id, source, drawn, label, and one column per classifier: keywords, learned, majority."""
    accuracy: pd.DataFrame
    """classifier, scope, accuracy, ci_low, ci_high, macro_f1 (mean over the labels that occur), n."""
    per_class: pd.DataFrame
    """classifier, label, precision, recall, f1, n, on all rows: the rare types are there through enrichment."""
    paired: pd.DataFrame
    """learned − keywords per scope, as `statistics.paired_difference` gives it."""
    confusion: dict[str, pd.DataFrame]
    """Per classifier, on the random sample: labels in the rows, predictions in the columns."""


def compare_classifiers(
    labelled: pd.DataFrame, embeddings: np.ndarray, confidence: float, power: float, seed: int
) -> Comparison:
    """Grade keywords, learned classifier and majority label on `labelled` (as `join_labels` gives it, in that order).

    Enriched rows are trained on, and count in their own scope only: they were chosen by label, so an accuracy that
    includes them is of no population. "five types" leaves out the questions labelled `other`, as the paper would.
    """
    groups = group_questions(labelled.question, embeddings)
    learned, majority = cross_validate(embeddings, labelled.label, groups, seed)
    keywords = labelled.question.map(classify_by_keywords)
    table = labelled[["id", "source", "drawn", "label"]].assign(keywords=keywords, learned=learned, majority=majority)
    names = ["keywords", "learned", "majority"]
    accuracy, per_class, paired = [], [], []
    for scope, rows in _scopes(table):
        right = {name: rows[name] == rows.label for name in names}
        for name in names:
            low, high = wilson(int(right[name].sum()), len(rows), confidence)
            present = [label for label in LABELS if (rows.label == label).any()]
            macro = f1_score(rows.label, rows[name], labels=present, average="macro", zero_division=0)
            accuracy.append((name, scope, right[name].mean(), low, high, macro, len(rows)))
        paired.append({"scope": scope, **paired_difference(right["learned"], right["keywords"], confidence, power)})
    for name in names:
        found = precision_recall_fscore_support(table.label, table[name], labels=LABELS, zero_division=0)
        per_class.extend((name, label, *values) for label, *values in zip(LABELS, *found, strict=True))
    sample = table[table.drawn == "random"]
    return Comparison(
        table,
        pd.DataFrame(accuracy, columns=["classifier", "scope", "accuracy", "ci_low", "ci_high", "macro_f1", "n"]),
        pd.DataFrame(per_class, columns=["classifier", "label", "precision", "recall", "f1", "n"]),
        pd.DataFrame(paired),
        {name: _confusion(sample.label, sample[name]) for name in names},
    )


def _scopes(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    sample = table[table.drawn == "random"]
    yield from zip(SCOPES, (sample, sample[sample.label != OTHER], table), strict=True)


def _confusion(labels: pd.Series, predicted: pd.Series) -> pd.DataFrame:
    counts = confusion_matrix(labels, predicted, labels=LABELS)
    return pd.DataFrame(counts, index=pd.Index(LABELS, name="label"), columns=pd.Index(LABELS, name="predicted"))
