"""Does the choice of the plan show in answers? Our plan against random plans of its size, uniform plans, the paper's.

A finished run's student and its headline questions, asked for the options' texts. All plans are rounded as `--rounding`
says, on the same training rows; weights are simulated, in the run's dtype. Every comparison is paired, question by
question, and Holm's adjustment is over all comparisons of this script. Units: fractions.
"""

import argparse
import json
import os
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
from record import RESULTS, Ratio, result_path, versions, write

from medkit.data import splits
from medkit.evaluation import accuracy, calibration
from medkit.inference import predictions
from medkit.modeling import batches, loading
from medkit.params import EvaluationParams, load_params
from medkit.quantization import plans, quantize, sensitivity
from medkit.stage import ROOT
from medkit.statistics import paired_difference, verdicts

PLAN = "plan"


def compare(right: pd.DataFrame, groups: pd.Series, judging: EvaluationParams) -> pd.DataFrame:
    """A row per variant beside the plan: `paired_difference` of the plan and it, and `verdicts` over all of them.

    `right` has a row per question and a column per variant, `groups` its questions' groups.
    """
    others = [name for name in right.columns if name != PLAN]
    rows = [paired_difference(right[PLAN], right[n], judging.confidence, judging.power, groups) for n in others]
    return verdicts(pd.DataFrame(rows, index=others), judging.confidence, judging.margin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "outputs" / "tiny", help="a finished run's folder")
    parser.add_argument("--params", type=Path, default=ROOT / "params" / "tiny.yaml")
    parser.add_argument("--random", type=int, default=3, help="random plans")
    parser.add_argument("--rounding", choices=["calibrated", "nearest"], default="calibrated")
    parser.add_argument("--limit", type=int, help="headline questions; default all that the run asked")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()

    params, before = load_params(args.params), os.getloadavg()
    section, judging, folder = params.quantization, params.evaluation, args.run / "03_lora" / "merged"
    model, tokenizer = loading.load_model(folder, params.models), loading.load_tokenizer(folder)
    questions = pd.read_parquet(args.run / "01_data" / "questions.parquet")
    source = judging.headline_source
    wanted = {"option_text": {source: params.inference.questions["option_text"][source]}}
    asked = predictions.choose_questions(questions, wanted, params.seed).head(args.limit or len(questions))
    train = splits.training_rows(questions, "labelled").sample(frac=1, random_state=params.seed)
    rows = batches.encode_questions(tokenizer, train.head(section.calibration_examples))

    damage = pd.read_parquet(args.run / "04_quantization" / "sensitivity.parquet")
    chosen = plans.Plan.model_validate_json((args.run / "04_quantization" / "plan" / quantize.PLAN).read_text())
    sizes = damage.set_index(["module", "scheme"]).bytes
    budget = int(sizes.loc[list(chosen.schemes.items())].sum())
    shapes = quantize.weight_shapes(model)
    fixed = [plans.paper_plan(shapes), *(plans.nf4_plan(shapes, ends) for ends in ("unquantized", "int8", "nf4"))]
    contenders = [chosen, *(plans.random_plan(damage, budget, seed) for seed in range(args.random)), *fixed]
    size = {p.name: int(sizes.loc[list(p.schemes.items())].sum()) for p in contenders}
    tables = []
    for plan in (None, *contenders):
        fitted = rows if args.rounding == "calibrated" else ()
        with sensitivity.fake_quantized(model, plan.schemes, section.double_quant, fitted) if plan else nullcontext():
            found = predictions.predict(model, tokenizer, asked, params.inference.batch_tokens, 1)
        tables.append(found.assign(variant=plan.name if plan else "student"))
        print(tables[-1].variant[0], f"load {os.getloadavg()[0]:.1f}", flush=True)
    judged = accuracy.judge(pd.concat(tables, ignore_index=True), questions)
    judged = judged[judged.scoring == judging.headline_scoring]
    errors = calibration.measure_calibration(judged, judging.confidence)
    errors = errors[errors.metric == "ece"].set_index("variant")
    right = judged.pivot(index="id", columns="variant", values="correct")
    groups = judged.drop_duplicates("id").set_index("id").group.reindex(right.index)
    compared = compare(right, groups, judging)
    raw = {
        "loadavg_before": before, "loadavg_after": os.getloadavg(), "bytes": size,
        "accuracy": right.mean().to_dict(), "plan_minus_other": compared.to_dict("index"),
        "ece": {name: dict(errors.loc[name, ["value", "ci_low", "ci_high", "n"]]) for name in errors.index},
    }  # fmt: skip
    ratios = {
        f"plan_minus_{name}/accuracy": Ratio(difference, None, "higher", len(right))
        for name, difference in compared.difference.items()
    }
    setup = {
        "student": "03_lora/merged of a tiny run", "questions": len(right), "source": source,
        "scoring": judging.headline_scoring, "rounding": args.rounding, "calibration_rows": len(rows),
        "repeats": "questions, paired", "holm_over_comparisons": len(compared),
        "versions": versions("torch", "transformers", "bitsandbytes"),
    }  # fmt: skip
    write("plans_accuracy", setup, ratios, json.loads(json.dumps(raw, default=float)), args.output)
    print(result_path("plans_accuracy", args.output).read_text())


if __name__ == "__main__":
    main()
