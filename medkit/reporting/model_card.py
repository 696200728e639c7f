"""The model card of a run: Hugging Face front matter with a model-index, and what a user must know before using it.

Its text is `card.md.j2`; its numbers are claims and facts of `results.json`, rounded, and nothing else. A section is
there only if the run has claims for it. Nothing is measured here and the hub is not asked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path

import pandas as pd
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from medkit.data.data_card import licence_of
from medkit.reporting import tables
from medkit.stage import DISCLAIMER, atomic_path
from medkit.variants import VARIANTS

TEMPLATE = Path(__file__).with_name("model_card.md.j2")
PRODUCTS = ("lora", "nf4", "paper_mix", "plan", "edge")
"""Variants that a user of the run would take away: their accuracies enter the model-index."""
DATASETS = {
    "icd_chapter": "ICD-10-CM: chapter of a diagnosis",
    "icd_easy": "ICD-10-CM: description of a code, far distractors",
    "icd_hard": "ICD-10-CM: description of a code, near distractors",
    "medqa": "MedQA (USMLE), five options",
    "medmcqa": "MedMCQA, held-out part of its validation split",
    "pubmedqa": "PubMedQA-L",
    "mmlu": "MMLU, medical subjects",
}
SETTINGS = {
    "models.teacher.source": "teacher, as it came",
    "models.student": "student",
    "distillation.num_layers": "decoder layers of a pruned student",
    "distillation.top_k": "teacher log-probabilities kept per position",
    "distillation.bridge": "what carries the teacher's distribution over",
    "distillation.temperature": "temperature of distillation",
    "distillation.ce_weight": "weight of the answers (CE)",
    "distillation.kl_weight": "weight of the teacher's distribution",
    "distillation.divergence": "how the two distributions are compared",
    "distillation.hidden_weight": "weight of hidden states",
    "distillation.entity_weight": "weight of whole entities",
    "distillation.order": "order of the first epoch",
    "lora.adapter.variant": "kind of adapter",
    "lora.adapter.rank": "LoRA rank",
    "lora.adapter.alpha": "LoRA alpha",
    "quantization.double_quant": "NF4 with double quantisation",
    "quantization.gguf_type": "type of the edge file",
    "seed": "seed",
}
"""Dotted key of params → what it is; keys that a run's params do not have are left out."""
Columns = dict[str, tuple[pd.DataFrame, Callable[[float], str]]]
"""Heading → claims, one a variant, and how their values are written."""


def write_card(path: Path, results: Path) -> Path:
    """Write the card of a results file to `path`. Raises StageError without whole results."""
    card = build_card(*tables.load_results(results))
    with atomic_path(path) as scratch:
        scratch.write_text(str(card))
    return path


def build_card(claims: pd.DataFrame, facts: Mapping) -> ModelCard:
    """The card as `huggingface_hub.ModelCard`.

    `facts` need run, headline_source, headline_scoring, date and device; used where there: params, base_model, license,
    chance, git_commit, versions.
    """
    params, source, scoring = facts.get("params", {}), facts["headline_source"], facts["headline_scoring"]
    clean = claims[claims.claim.str.startswith("accuracy_clean/")]
    clean = clean.assign(claim=clean.claim.str.replace("accuracy_clean/", "accuracy/"))
    confidence, margin = _lookup(params, "evaluation.confidence"), _lookup(params, "evaluation.margin")
    card = ModelCard.from_template(
        _front_matter(claims, facts),
        template_path=TEMPLATE,
        facts=facts,
        disclaimer=DISCLAIMER,
        settings=_settings(params),
        training=_training(params),
        confidence=confidence and f"{confidence:.0%}",
        margin=margin and f"{margin:g}",
        chance="chance" in facts and _two(facts["chance"]),
        accuracy=_filled(tables.accuracy_table(claims, scoring)),
        clean=_filled(tables.accuracy_table(clean, scoring)),
        steps=_filled(tables.steps_table(claims, source, scoring)),
        robustness=_robustness(claims),
        calibration=_calibration(claims, source, scoring),
        safety=_safety(claims),
        cost=_filled(tables.cost_table(claims)),
        energy=_energy(claims),
        provenance=_provenance(facts),
    )
    card.text = re.sub(r"\n{3,}", "\n\n", card.text).rstrip() + "\n"
    return card


def _filled(table: str) -> str:
    """The table, or nothing where it has no rows."""
    return table if len(table.splitlines()) > 2 else ""


# --- front matter ----------------------------------------------------------------------------------------------------


def _front_matter(claims: pd.DataFrame, facts: Mapping) -> ModelCardData:
    hub = (_lookup(facts.get("params", {}), "models.teacher.source") or {}).get("repo")
    licence = facts.get("license") or ("other" if hub else "apache-2.0")  # a hub model brings its own, unknown here
    return ModelCardData(
        language="en",
        license=licence,
        license_name="that-of-the-base-model" if licence == "other" else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=facts.get("base_model") or hub,
        tags=["medical", "distillation", "lora", "nf4", "research"],
        model_name=f"medkit-{facts['run']}",
        eval_results=_eval_results(claims, facts["headline_scoring"]) or None,
    )


def _eval_results(claims: pd.DataFrame, scoring: str) -> list[EvalResult]:
    table = claims[claims.claim.str.startswith("accuracy/") & (claims.metric == scoring)]
    table = table[table.variant.isin(PRODUCTS)]
    table = table.assign(source=table.claim.str.removeprefix("accuracy/"))
    return [
        EvalResult(
            task_type="multiple-choice",
            dataset_type=row.source,
            dataset_name=DATASETS.get(row.source, row.source),
            dataset_split="test",
            metric_type="accuracy",
            metric_name=f"accuracy, {VARIANTS[row.variant].label}",
            metric_value=round(row.value, 4),
            metric_args={
                "variant": row.variant,
                "scoring": scoring,
                "n": int(row.n),
                "ci_low": round(row.ci_low, 4),
                "ci_high": round(row.ci_high, 4),
            },
        )
        for row in table.itertuples()
    ]


# --- what it was made of ---------------------------------------------------------------------------------------------


def _lookup(params: Mapping, key: str):
    """The value under a dotted key, None where there is none: profiles of other times have other keys."""
    return reduce(lambda at, part: at.get(part) if isinstance(at, Mapping) else None, key.split("."), params)


def _say(value) -> str:
    """A setting as text; a source by what was taken from where."""
    match value:
        case bool():
            return "yes" if value else "no"
        case {"source": source}:
            return _say(source)
        case {"kind": "wheel", **source}:
            return f"{source['member'].rpartition('/')[2]} of {source['package']} {source['version']}"
        case {"kind": "hub", **source}:
            return f"{source['repo']} at {source['revision']}"
        case {"path": path}:
            return str(path)
        case "pruned_teacher":
            return "the corrected teacher with layers cut out"
    return str(value)


def _settings(params: Mapping) -> str:
    found = {what: _lookup(params, key) for key, what in SETTINGS.items()}
    rows = [[what, _say(value)] for what, value in found.items() if value is not None]
    return _filled(tables.markdown(["setting", "value"], rows))


def _training(params: Mapping) -> str:
    rows = [
        [source, *(str(counts.get(s, 0)) for s in ("train", "transfer", "valid", "test")), licence_of(source)]
        for source, counts in (_lookup(params, "data.datasets") or {}).items()
    ]
    return _filled(tables.markdown(["source", "train", "unlabelled", "validation", "test", "licence"], rows))


def _provenance(facts: Mapping) -> str:
    rows = [["run", f"`{facts['run']}`"], ["date", facts["date"]], ["device", facts["device"]]]
    if facts.get("git_commit"):
        rows.append(["commit", f"`{facts['git_commit']}`"])
    return tables.markdown(["what", "which"], rows + [[*pair] for pair in facts.get("versions", {}).items()])


# --- tables of claims ------------------------------------------------------------------------------------------------


def _by_variant(columns: Columns) -> str:
    """Markdown: a row per variant, a column per heading, value and interval; a dash where nothing was measured."""
    held = {heading: rows.drop_duplicates("variant").set_index("variant") for heading, (rows, _) in columns.items()}
    held = {heading: rows for heading, rows in held.items() if len(rows)}
    rows = [
        [VARIANTS[v].label, *(_cell(held[h].loc[v], columns[h][1]) if v in held[h].index else "–" for h in held)]
        for v in VARIANTS
        if any(v in rows.index for rows in held.values())
    ]
    return _filled(tables.markdown(["variant", *held], rows))


def _cell(row: pd.Series, write: Callable[[float], str]) -> str:
    if pd.isna(row.ci_low) or pd.isna(row.ci_high):
        return write(row.value)
    return f"{write(row.value)} [{write(row.ci_low)}, {write(row.ci_high)}]"


def _two(value: float) -> str:
    return f"{value:.2f}"


def _three(value: float) -> str:
    return f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _significant(value: float) -> str:
    return f"{value:,.3g}"


def _of_sources(claims: pd.DataFrame, name: str) -> dict[str, pd.DataFrame]:
    """Source → claims `<name>/<source>`."""
    rows = claims[claims.claim.str.startswith(f"{name}/")]
    return {claim.removeprefix(f"{name}/"): group for claim, group in rows.groupby("claim", sort=False)}


def _counted(heading: str, rows: pd.DataFrame) -> str:
    return f"{heading}<br>n = {rows.n.max():.0f}"


def _robustness(claims: pd.DataFrame) -> str:
    columns: Columns = {
        _counted(f"{what}, `{source}`", rows): (rows, write)
        for name, what, write in (
            ("shuffle_consistency", "same option under other orders", _two),
            ("swap_drop", "change of accuracy under another name", _signed),
        )
        for source, rows in _of_sources(claims, name).items()
    }
    return _by_variant(columns)


def _calibration(claims: pd.DataFrame, source: str, scoring: str) -> str:
    kinds = {
        "ece": ("expected calibration error", _three),
        "brier": ("Brier score", _three),
        "aurc": ("area under risk–coverage", _three),
        "accuracy_at_80": ("accuracy, least sure fifth left out", _two),
    }
    mine = claims[claims.metric == scoring]
    return _by_variant({head: (mine[mine.claim == f"{k}/{source}"], write) for k, (head, write) in kinds.items()})


def _safety(claims: pd.DataFrame) -> str:
    rows = claims[claims.claim.str.startswith("safe_share/") & (claims.metric == "option_text_norm")]
    groups = rows.groupby(rows.claim.str.removeprefix("safe_share/"), sort=False)
    return _by_variant({_counted(name.replace("_", " "), group): (group, _two) for name, group in groups})


def _energy(claims: pd.DataFrame) -> str:
    headings = {
        "energy_wh_per_1000_answers": "Wh per 1,000 answers",
        "energy_wh_per_correct_answer": "Wh per correct answer",
        "cost_per_1000_answers": "price of 1,000 answers",
        "cost_per_correct_answer": "price of a correct answer",
    }
    return _by_variant({h: (claims[claims.claim == name], _significant) for name, h in headings.items()})
