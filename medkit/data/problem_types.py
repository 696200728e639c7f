"""The problem type of an open question, which decides its prompt template: by keywords, as in the paper.

The paper (arXiv 2505.00025) names five types and publishes neither its keywords nor its accuracy. Ours are measured on
questions with labels (docs/labelling.md). A regression on sentence embeddings was not detectably better (docs/log).
"""

import re
from pathlib import Path

import pandas as pd
import yaml
from sklearn.metrics import cohen_kappa_score, f1_score

from medkit.data.raw_questions import DataError
from medkit.statistics import wilson

PROBLEMS = ("medication", "diagnosis", "treatment", "prevention", "emergency")
OTHER = "other"  # definitions, prognosis, anatomy: the paper has no such type
LABELS = (*PROBLEMS, OTHER)
PRECEDENCE = ("emergency", "medication", "prevention", "treatment", "diagnosis")  # of equal counts, as in the labelling
KEYWORDS: dict[str, frozenset[str]] = {
    problem: frozenset(words.split())
    for problem, words in yaml.safe_load(Path(__file__).with_name("problem_keywords.yaml").read_text()).items()
}
# Stems of International Nonproprietary Names (WHO, "The use of stems in the selection of INN"), as endings that no
# ordinary word has: longer than the stem where the stem alone would match one (-terol and cholesterol).
DRUG_NAME = re.compile(
    r"cef\w+|sulfa\w+|\w{2,}(afil|[ae]racetam|arone|a[sz]one|isone|azepam|azepine|azine|azole|azosin|barbital|bicin|"
    r"buterol|meterol|caine|cillin|c[iy]clovir|codone|coxib|cycline|dipine|dopa|dronate|dronic|fenac|fibrate|floxacin|"
    r"formin|gabalin|gliflozin|gliptin|glitazone|glutide|grel|grelor|lafaxine|lukast|mab|micin|mycin|morphone|nib|olol|"
    r"olone|onide|oxacin|oxetine|parin|platin|pramine|pril|profen|prost|sartan|semide|setron|statin|stigmine|taxel|"
    r"thiazide|tidine|traline|triptan|triptyline|tropium|vir|vudine|xaban|zolam)"
)


def classify_by_keywords(question: str) -> str:
    """The type c with the most keywords, argmax_c Σ_w 1[w ∈ K_c]; of equal counts the first in PRECEDENCE.

    Names of drugs count for `medication`. Without a keyword `other`, where the paper's argmax gives its first type.
    """
    words = re.findall(r"[a-z]+", question.casefold())
    counts = {problem: sum(word in listed for word in words) for problem, listed in KEYWORDS.items()}
    counts["medication"] += sum(bool(DRUG_NAME.fullmatch(w)) for w in words if w not in KEYWORDS["medication"])
    best = max(PRECEDENCE, key=counts.__getitem__)  # max returns the first of equals
    return best if counts[best] else OTHER


def join_labels(open_questions: pd.DataFrame) -> pd.DataFrame:
    """The package's labels (id, source, label, second_label, drawn) with the text of their questions.

    `drawn` is random (the sample that accuracy is reported on) or enriched (from further questions, which were read to
    find the two rarest types). `second_label` is "" if the question was read once. open_questions: of
    `readers.read_open_questions`; an id holds a digest of its text. Raises DataError if a labelled question is missing.
    """
    labels = pd.read_csv(Path(__file__).with_name("problem_types.csv"), keep_default_na=False)
    missing = sorted(set(labels.id) - set(open_questions.id))
    if missing:
        raise DataError(f"{len(missing)} labelled questions are missing, first {missing[0]}; use the pinned wheel")
    return labels.merge(open_questions[["id", "question"]], on="id", validate="one_to_one")


def agreement(labels: pd.DataFrame) -> dict[str, float]:
    """Of the questions labelled twice: n, share labelled the same, and Cohen's kappa (chance-corrected agreement)."""
    twice = labels[labels.second_label != ""]
    same = (twice.label == twice.second_label).mean()
    return {"n": len(twice), "same": float(same), "kappa": float(cohen_kappa_score(twice.label, twice.second_label))}


def measure_keywords(labelled: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """How the keywords do on labelled questions with a column `keywords`, the type that they give.

    Columns scope, accuracy, ci_low, ci_high (Wilson), majority (share of the commonest label), macro_f1, n. Enriched
    rows count in their own scope only: they were chosen by label, so an accuracy that includes them is not of any
    population. "five types" leaves out the questions labelled `other`, which the paper does not have.
    """
    sample = labelled[labelled.drawn == "random"]
    scopes = {"random": sample, "random, five types": sample[sample.label != OTHER], "with enrichment": labelled}
    rows = []
    for scope, table in scopes.items():
        shares, right = table.label.value_counts(normalize=True), int((table.keywords == table.label).sum())
        macro_f1 = f1_score(table.label, table.keywords, labels=list(shares.index), average="macro", zero_division=0)
        interval = wilson(right, len(table), confidence)
        rows.append((scope, right / len(table), *interval, shares.iloc[0], macro_f1, len(table)))
    return pd.DataFrame(rows, columns=["scope", "accuracy", "ci_low", "ci_high", "majority", "macro_f1", "n"])
