"""`python -m medkit plan`: the best plan that fits, clear errors, and no network."""

import json
import re

import pytest

from medkit.quantization import memory_budget

STUDENT = "DeepSeek-R1-Distill-Qwen-7B"


@pytest.fixture
def plan(command, no_network):
    """plan(*arguments): exit code, output and errors of the command, run without a network."""
    yield lambda *arguments: command("plan", *arguments)
    assert no_network == []


@pytest.fixture(scope="module")
def student():
    return memory_budget.estimate_presets(memory_budget.read_config(STUDENT), batch=4, context=4096)


def test_the_table_has_every_preset_and_names_the_best(plan, student):
    code, out, err = plan("--model", STUDENT, "--budget", "8GiB", "--batch", "4", "--context", "4096")
    assert (code, err) == (0, "")
    best = next(e for e in student if e.total <= 8 * 2**30)
    assert f"best: {best.plan}, " in out
    assert max(map(len, out.splitlines())) < 120
    for e in student:
        (row,) = (line for line in out.splitlines() if re.match(rf"{e.plan} ", line))
        assert row.split()[-2:] == [f"{e.total / 2**30:.2f}", f"{8 - e.total / 2**30:+.2f}"]
    in_gb = plan("--model", STUDENT, "--budget", "8.2GB", "--batch", "4")[1]
    in_gib = plan("--model", STUDENT, "--budget", "8.2GiB", "--batch", "4")[1]
    assert re.search("best: (.*)", in_gb)[1] != re.search("best: (.*)", in_gib)[1]


def test_if_nothing_fits_the_error_names_the_smallest_total(plan, student):
    code, out, err = plan("--model", STUDENT, "--budget", "3GB", "--batch", "4", "--context", "4096")
    assert code == 1
    assert f"{min(e.total for e in student) / 1e9:.2f} GB" in err
    assert err.startswith("medkit: ") and err.count("\n") == 1
    assert "nf4_all" in out and "best:" not in out


def test_a_config_file_its_folder_and_a_known_name_are_the_same_model(plan, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(memory_budget.KNOWN_MODELS[STUDENT]))
    answers = [
        plan("--model", model, "--budget", "8GB")[1].splitlines()[1:]
        for model in (str(tmp_path), str(tmp_path / "config.json"), STUDENT, f"deepseek-ai/{STUDENT}")
    ]
    assert all(answer == answers[0] for answer in answers)


WRONG_CONFIGS = [
    ("{not json", "config"),
    ('{"model_type": "gpt2"}', "gpt2"),
    ('{"model_type": "llama", "hidden_size": "wide"}', "hidden_size"),
    ('{"model_type": "mistral", "sliding_window": 4096}', "sliding windows"),
]


def test_a_wrong_argument_or_config_is_one_sentence_and_exit_code_one(plan, tmp_path):
    wrong = [
        (["--model", "no-such-model", "--budget", "8GB"], STUDENT),
        *((["--model", STUDENT, "--budget", size], "8GiB") for size in ("8", "0GB", "8 bananas")),
        (["--model", STUDENT, "--budget", "8GB", "--context", "200000"], "131072"),
    ]
    for number, (text, named) in enumerate(WRONG_CONFIGS):
        (tmp_path / f"{number}.json").write_text(text)
        wrong.append((["--model", str(tmp_path / f"{number}.json"), "--budget", "8GB"], named))
    for arguments, named in wrong:
        code, _, err = plan(*arguments)
        assert code == 1 and named in err, arguments
        assert err.startswith("medkit: ") and err.count("\n") == 1


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}


@pytest.mark.parametrize(("rope", "last"), [(YARN, 131072), (LLAMA3, 32768)])
def test_a_rope_factor_lengthens_the_context(plan, tmp_path, rope, last):
    config = memory_budget.KNOWN_MODELS[STUDENT] | {"max_position_embeddings": 32768, "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ("--model", str(tmp_path), "--budget", "100GB", "--context")
    assert plan(*arguments, str(last))[0] == 0
    code, _, err = plan(*arguments, str(last + 1))
    assert code == 1 and f"end at {last}" in err
