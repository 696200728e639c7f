"""The variants of a run: every model that the notebooks make, in one registry.

Figures take labels and colours from here, notebook 05 takes the folders, notebook 06 the baselines and the questions.
A new variant is one row of `VARIANTS`.
"""

from typing import NamedTuple

FINAL = "student_kd"  # the student that is adapted, compressed and exported
REASONERS = ("student_seq", "student_seq_kd")  # students that learn to give reasons before the answer
ADAPTER = "adapter.gguf"  # beside the edge file: notebook 03's adapter, which llama.cpp adds to it on request
TASKS = ".tasks.json"  # beside an edge file: what it was taught, how it did in the test; written by notebook 06


class Variant(NamedTuple):
    name: str
    label: str
    colour: str  # Of the palettes of Okabe and Ito and of Tol, which colour-blind readers can tell apart
    folder: str | None
    """Below the run's folder; empty for the teacher as it was downloaded, None for what is no language model."""
    baseline: str | None  # The variant that this one is compared with
    question: str | None  # What the comparison with the baseline answers


VARIANTS = {
    v.name: v
    for v in [
        Variant("first", "first option", "#dddddd", None, None, None),
        Variant("longest", "longest option", "#bbbbbb", None, None, None),
        Variant("majority", "most frequent answer", "#cccccc", None, None, None),
        Variant("tfidf", "TF-IDF + logistic regression", "#808022", None, None, None),
        Variant("regex", "regular expressions", "#b8a04a", None, None, None),
        Variant("teacher_base", "teacher, as downloaded", "#999999", "", None, None),
        Variant("teacher", "teacher", "#0072b2", "02_distillation/teacher", "teacher_base",
                "Does correcting the teacher teach it?"),
        Variant("base", "student, untrained", "#c2a5cf", "02_distillation/base", "teacher_base",
                "What does cutting layers cost?"),
        Variant("student_ce", "labels alone", "#e69f00", "02_distillation/student_ce", "base",
                "What do the few labels teach?"),
        Variant("student_hard", "teacher's answers", "#332288", "02_distillation/student_hard", "student_ce",
                "Do the teacher's answers, as text, add to the labels?"),
        Variant("student_self", "its own answers", "#b2182b", "02_distillation/student_self", "student_ce",
                "Do the student's own answers add to the labels?"),
        Variant("student_kd", "distilled student", "#009e73", "02_distillation/student_kd", "student_ce",
                "Does the teacher add to the labels?"),
        Variant("student_ceiling", "true answers", "#5e3c99", "02_distillation/student_ceiling", "student_kd",
                "What would true answers add to the teacher's?"),
        Variant("student_seq", "teacher's reasons", "#882255", "02_distillation/student_seq", "student_ce",
                "Do the teacher's verified answers with reasons add to the labels?"),
        Variant("student_seq_kd", "reasons with KL", "#44aa99", "02_distillation/student_seq_kd", "student_seq",
                "Does the teacher's distribution along its reasons add to their text?"),
        Variant("lora", "+ LoRA", "#cc79a7", "03_lora/merged", "student_kd",
                "What does the adapter change?"),
        Variant("nf4", "NF4", "#d55e00", "04_quantization/nf4", "student_kd", "What does NF4 cost?"),
        Variant("paper_mix", "paper's mix", "#8c510a", "04_quantization/paper_mix", "student_kd",
                "What does the paper's mix cost?"),
        Variant("plan", "our plan", "#56b4e9", "04_quantization/plan", "student_kd", "What does our plan cost?"),
        Variant("edge", "edge file", "#000000", "04_quantization/edge/student.gguf", "student_kd",
                "What does the edge file cost?"),
        Variant("edge_small", "smaller edge file", "#666666", "04_quantization/edge_small/student.gguf", "student_kd",
                "What does the smaller edge file cost?"),
        Variant("edge_lora", "edge file + adapter", "#aa4499", f"04_quantization/edge/{ADAPTER}", "lora",
                "What does the edge file cost the adapter?"),
    ]
}  # fmt: skip


# every comparison of the evaluation: the variant, its baseline, and the question that their difference answers
STEPS = [
    *((v.name, v.baseline, v.question) for v in VARIANTS.values() if v.baseline),
    ("teacher", "student_ce", "Does the teacher know what the labels do not say?"),
    ("student_kd", "student_hard", "Are soft answers better than hard ones?"),
    ("edge", "student_ce", "Is the edge file better than labels alone?"),
    ("edge", "teacher_base", "Is the edge file better than the teacher as downloaded?"),
    ("plan", "nf4", "Does our plan keep more than the library's NF4?"),
    *((v, b, "Is it better than a baseline without a language model?")
      for v in ("teacher", "student_ce", FINAL, "edge", "edge_small") for b in ("tfidf", "regex")),
]  # fmt: skip


# made from the distilled student: what a user of a run would take away
MADE_FROM_FINAL = [
    v.name for v in VARIANTS.values() if v.baseline == FINAL and v.folder and not v.folder.startswith("02_")
]


def list_variants(params) -> dict[str, Variant]:
    """The language models that a run with these `Params` makes, in registry order.

    An edge file that is null is not written, nor is an adapter beside it, nor one of DoRA, which GGUF does not know.
    """
    distillation = params.distillation
    made = {"student_ce", FINAL, *distillation.students, *(["student_seq"] if distillation.rationales else [])}
    made |= {name for name in ("edge", "edge_small") if getattr(params.quantization, name)}
    made |= {"edge_lora"} if params.quantization.edge and params.lora.adapter.variant != "dora" else set()
    models = {name: v for name, v in VARIANTS.items() if v.folder is not None}
    return {name: v for name, v in models.items() if name in made or not name.startswith(("student_", "edge"))}
