"""The variants of a run: every model that the notebooks make, in one registry.

Figures take labels and colours from here, notebook 05 takes the folders, notebook 06 the baselines and the questions.
A new variant is one row of `VARIANTS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Variant(NamedTuple):
    name: str
    label: str
    colour: str
    """Okabe and Ito's palette, which colour-blind readers can tell apart."""
    folder: str | None
    """Below the run's folder; empty for the teacher as it was downloaded, None for what is no language model."""
    baseline: str | None
    """The variant that this one is made from."""
    question: str | None
    """What the comparison with the baseline answers."""


VARIANTS = {
    v.name: v
    for v in [
        Variant("majority", "most frequent answer", "#cccccc", None, None, None),
        Variant("tfidf", "TF-IDF + logistic regression", "#777733", None, None, None),
        Variant("teacher_base", "teacher, uncorrected", "#999999", "", None, None),
        Variant("teacher", "teacher", "#0072b2", "02_distillation/teacher", "teacher_base",
                "Does correcting the teacher teach it?"),
        Variant("base", "student, untrained", "#c2a5cf", "02_distillation/base", "teacher",
                "What does cutting layers cost?"),
        Variant("student_ce", "student CE", "#e69f00", "02_distillation/student_ce", "base",
                "Does training on answers bring it back?"),
        Variant("student_seq", "student seq.", "#f0e442", "02_distillation/student_seq", "student_ce",
                "Are the teacher's verified answers better to learn from?"),
        Variant("student_kd", "student CE + KL", "#009e73", "02_distillation/student_kd", "student_ce",
                "Does the teacher's distribution add to the answers?"),
        Variant("student_onpolicy", "+ on-policy", "#882255", "02_distillation/student_onpolicy", "student_kd",
                "Does training on the student's own answers add to distillation?"),
        Variant("lora", "+ LoRA", "#cc79a7", "03_lora/merged", "student_kd", "Does LoRA add to distillation?"),
        Variant("nf4", "+ NF4", "#d55e00", "04_quantization/nf4", "lora", "What does NF4 cost?"),
        Variant("paper_mix", "+ paper's mix", "#8c510a", "04_quantization/paper_mix", "lora",
                "What does the paper's mix cost?"),
        Variant("plan", "+ our plan", "#56b4e9", "04_quantization/plan", "lora", "What does our plan cost?"),
        Variant("edge", "edge file", "#000000", "04_quantization/edge/student.gguf", "lora",
                "What does the edge file cost?"),
        Variant("edge_small", "smaller edge file", "#666666", "04_quantization/edge_small/student.gguf", "student_kd",
                "What does the smaller edge file cost?"),
    ]
}  # fmt: skip
# every comparison of the evaluation: the variant, its baseline, and the question that their difference answers
STEPS = [
    *((v.name, v.baseline, v.question) for v in VARIANTS.values() if v.baseline),
    ("plan", "nf4", "Does our plan keep more than the library's NF4?"),
    ("lora", "tfidf", "Does the student know more than a table of words?"),
    ("nf4", "teacher_base", "Is the small model better than the large one as it came?"),
]


def list_variants(students: Sequence[str]) -> dict[str, Variant]:
    """The language models of a run with these trained students (`distillation.list_students`), in registry order."""
    models = {name: v for name, v in VARIANTS.items() if v.folder is not None}
    return {name: v for name, v in models.items() if not name.startswith("student_") or name in students}
