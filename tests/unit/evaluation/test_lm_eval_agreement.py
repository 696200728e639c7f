"""lm-evaluation-harness and we read the same items the same way: log-likelihoods, predictions, accuracies."""

import importlib

import pytest

from medkit.modeling import loading
from medkit.params import load_params
from medkit.stage import ROOT

pytest.importorskip("lm_eval")
ITEMS = 4


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TOKENIZERS_PARALLELISM"):
            patch.setenv(variable, "1")  # the script sets them for itself; given back with the patch
        yield importlib.import_module("benchmarks.evaluation.lm_eval_agreement")


@pytest.mark.weights
def test_log_likelihoods_predictions_and_accuracies_are_the_same(benchmark):
    """A few real questions of each set, by SmolLM2 cut to the smoke profile's layers."""
    params = load_params(ROOT / "params" / "smoke.yaml")
    folder = loading.local_folder(params.models.teacher)
    settings = params.models.model_copy(update={"device": "cpu"})
    model = loading.load_model(folder, settings, params.models.teacher.keep_layers)
    questions = {name: table.head(ITEMS) for name, table in benchmark.read_questions().items()}
    found = benchmark.compare(model, loading.load_tokenizer(folder), questions, rounds=1, tasks=list(benchmark.TASKS))
    assert {task.source for task in benchmark.TASKS.values()} == {"medqa", "medmcqa", "pubmedqa", "mmlu"}
    assert found.keys() == benchmark.TASKS.keys()
    for name, result in found.items():
        assert (result["items"], result["predictions_equal"]) == (ITEMS, 1), name
        assert result["max_abs_loglikelihood_difference"] < 1e-3, name
        metrics = {"acc"} if name in ("pubmedqa", "mmlu") else {"acc", "acc_norm"}
        assert result["accuracy"]["lm_eval"].keys() == metrics
        assert result["accuracy"]["medkit"] == pytest.approx(result["accuracy"]["lm_eval"], abs=5e-5)


def test_five_options_are_written_as_the_harness_writes_four(benchmark):
    """MedQA's format is copied for a fifth option; without that option it is the package's own, word for word."""
    from jinja2 import Template
    from lm_eval.tasks.medqa.preprocess_medqa import doc_to_text

    question = {"question": "Which vitamin prevents scurvy?", "options": ["A1", "B2", "C3", "D4", "E5"], "answer": 2}
    document = benchmark.TASKS["medqa"].document(question)
    ours = Template(benchmark.TASKS["medqa"].changes["doc_to_text"]).render(document)
    assert ours.replace("E. E5\n", "") == doc_to_text(document)
    assert document["label"] == 2


def test_a_disagreement_is_seen(benchmark):
    """Of two documents the harness prefers the second option, then the first."""
    pairs = [("Question: …\nAnswer:", " yes"), ("Question: …\nAnswer:", " maybe")]
    scores = [[-3.0, -1.0], [-1.0, -3.0]]
    samples = [
        {"arguments": pairs, "filtered_resps": [(value, value > -2) for value in row], "acc": right}
        for row, right in zip(scores, (1.0, 0.0), strict=True)
    ]
    same = benchmark.summarise(samples, scores, [1, 1])
    assert same["predictions_equal"] == 1 and same["max_abs_loglikelihood_difference"] == 0
    assert same["accuracy"] == {"lm_eval": {"acc": 0.5}, "medkit": {"acc": 0.5}}
    other = benchmark.summarise(samples, [[-0.5, -1.0], [-1.0, -3.0]], [1, 1])
    assert (other["predictions_equal"], other["max_abs_loglikelihood_difference"]) == (0.5, 2.5)
    assert other["gaps_where_different_nats"] == [2.0] and other["accuracy"]["medkit"] == {"acc": 0}
