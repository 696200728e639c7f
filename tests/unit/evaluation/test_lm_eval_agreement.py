"""lm-evaluation-harness and we read the same items the same way: log-likelihoods, predictions, accuracies."""

import importlib

import pytest

from medkit.modeling import loading
from medkit.params import load_params
from medkit.stage import ROOT

pytest.importorskip("lm_eval")
ITEMS = 6


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TOKENIZERS_PARALLELISM"):
            patch.setenv(variable, "1")  # the script sets them for itself; given back with the patch
        yield importlib.import_module("benchmarks.evaluation.lm_eval_agreement")


@pytest.fixture(scope="module")
def found(benchmark):
    """The comparison on a few real questions of each set, by SmolLM2 cut to the smoke profile's layers."""
    params = load_params(ROOT / "params" / "smoke.yaml")
    folder = loading.local_folder(params.models.teacher)
    settings = params.models.model_copy(update={"device": "cpu"})
    model = loading.load_model(folder, settings, params.models.teacher.keep_layers)
    questions = {name: table.head(ITEMS) for name, table in benchmark.read_questions().items()}
    return benchmark.compare(model, loading.load_tokenizer(folder), questions, rounds=1, tasks=list(benchmark.TASKS))


@pytest.mark.weights
def test_every_set_of_the_paper_is_compared(benchmark, found):
    assert {task.source for task in benchmark.TASKS.values()} == {"medqa", "medmcqa", "pubmedqa", "mmlu"}
    assert {name: result["items"] for name, result in found.items()} == dict.fromkeys(benchmark.TASKS, ITEMS)


@pytest.mark.weights
def test_predictions_and_log_likelihoods_are_the_same(found):
    for name, result in found.items():
        assert result["predictions_equal"] == 1, name
        assert result["max_abs_loglikelihood_difference"] < 1e-3, name


@pytest.mark.weights
def test_accuracies_are_the_same_under_every_metric_of_the_task(found):
    metrics = {name: set(result["accuracy"]["lm_eval"]) for name, result in found.items()}
    assert metrics["pubmedqa"] == metrics["mmlu"] == {"acc"}
    assert metrics["medqa"] == metrics["medmcqa"] == metrics["medmcqa_text"] == {"acc", "acc_norm"}
    for result in found.values():
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


@pytest.fixture
def samples():
    """Two documents as the harness reports them: it prefers the second option, then the first."""
    pairs = [("Question: …\nAnswer:", " yes"), ("Question: …\nAnswer:", " maybe")]
    return [
        {"arguments": pairs, "filtered_resps": [(-3.0, False), (-1.0, True)], "acc": 1.0},
        {"arguments": pairs, "filtered_resps": [(-1.0, True), (-3.0, False)], "acc": 0.0},
    ]


def test_a_disagreement_is_seen(benchmark, samples):
    same = benchmark.summarise(samples, [[-3.0, -1.0], [-1.0, -3.0]], [1, 1])
    assert same["predictions_equal"] == 1 and same["max_abs_loglikelihood_difference"] == 0
    assert same["accuracy"] == {"lm_eval": {"acc": 0.5}, "medkit": {"acc": 0.5}}
    other = benchmark.summarise(samples, [[-0.5, -1.0], [-1.0, -3.0]], [1, 1])
    assert other["predictions_equal"] == 0.5
    assert other["gaps_where_different_nats"] == [2.0]
    assert other["max_abs_loglikelihood_difference"] == 2.5
    assert other["accuracy"]["medkit"] == {"acc": 0}
