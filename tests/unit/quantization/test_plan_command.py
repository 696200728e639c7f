"""`python -m medkit plan`: the best that fits is found, what does not fit is told, and no file or network is needed."""

import json
import random
import re
import socket
import sys
from dataclasses import replace

import pytest
from transformers import Gemma2Config, Gemma3TextConfig, GemmaConfig, LlamaConfig

from medkit import __main__
from medkit.params import ParamsError
from medkit.quantization import activation_memory, memory_budget, memory_ledger

STUDENT = "DeepSeek-R1-Distill-Qwen-7B"
RECIPES = ["bf16", "int8", "paper_mix", "nf4", "nf4_int8_embed", "nf4_all"]


@pytest.fixture
def command(monkeypatch, capsys):
    """plan(*arguments): exit code, output and errors of the command, run in this process without a network."""

    def refuse(*_, **__):
        raise AssertionError("a plan is made without a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medkit", "plan", *arguments])
        monkeypatch.setattr(__main__.console, "file", sys.stdout)
        with pytest.raises(SystemExit) as stopped:
            __main__.main()
        said = capsys.readouterr()
        return stopped.value.code or 0, said.out, said.err

    return run


@pytest.fixture(scope="module")
def student():
    return memory_budget.estimate(memory_budget.read_config(STUDENT), batch=4, context=4096)


def test_every_recipe_is_estimated_with_either_cache_and_most_bits_come_first(student):
    assert [(e.recipe, e.kv_format) for e in student] == [(r, kv) for r in RECIPES for kv in ("bf16", "fp8")]
    bits = [e.bits_per_weight for e in student]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] == 16
    assert 4.12 < bits[-1] < 4.14
    assert all(a.total > b.total for a, b in zip(student[::2], student[2::2], strict=False))
    for wide, narrow in zip(student[::2], student[1::2], strict=True):
        assert wide.kv_cache > narrow.kv_cache == pytest.approx(wide.kv_cache / 2, rel=1e-4)


def test_a_total_is_weights_scales_cache_and_the_larger_pass(student):
    config = memory_budget.read_config(STUDENT)
    shapes = memory_ledger.model_shapes(config)
    (mix,) = (e for e in student if (e.recipe, e.kv_format) == ("paper_mix", "bf16"))
    schemes = memory_budget.preset_schemes(shapes)["paper_mix"]
    passes = activation_memory.activation_bytes(config, shapes, schemes, 4, 4096)
    stored = memory_ledger.plan_bytes(shapes, schemes).bytes.sum()
    assert mix.total == stored + memory_ledger.kv_cache_bytes(config, 4, 4096, 2) + max(passes.values())
    assert mix.bits_per_weight == 8 * stored / sum(weight.count for weight in shapes)


def test_the_best_is_the_first_that_fits_to_the_byte(student):
    for e in student:
        assert memory_budget.choose(student, e.total).bits_per_weight >= e.bits_per_weight
        assert memory_budget.choose(student, e.total).total <= e.total
    least = min(student, key=lambda e: e.total)
    assert memory_budget.choose(student, least.total) is least
    assert memory_budget.choose(student, least.total - 1) is None
    same = [replace(least, kv_format="bf16"), least]
    assert memory_budget.choose(same, least.total).kv_format == "bf16"


def test_a_model_with_windows_has_no_fp8_cache():
    config = Gemma3TextConfig(sliding_window=512, max_position_embeddings=8192)
    assert {e.kv_format for e in memory_budget.estimate(config, 1, 4096)} == {"bf16"}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8e9),
        ("8GiB", 8 * 2**30),
        ("1.5 gb", 1.5e9),
        ("800MB", 8e8),
        ("2TiB", 2 * 2**40),
        (" 24gib ", 24 * 2**30),
    ],
)
def test_sizes_say_their_unit(text, size):
    number, unit = memory_budget.parse_size(text)
    assert number * memory_budget.UNITS[unit] == size


@pytest.mark.parametrize("text", ["8", "GB", "-8GB", "0GB", "8 bananas", "8Gb it", "1e9GB", ""])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(ParamsError, match="8GiB"):
        memory_budget.parse_size(text)


def test_the_table_names_the_best_and_what_is_missing(command, student):
    code, out, err = command("--model", STUDENT, "--budget", "8GiB", "--batch", "4", "--context", "4096")
    assert (code, err) == (0, "")
    best = memory_budget.choose(student, 8 * 2**30)
    assert f"best: {best.recipe}, key-value cache in {best.kv_format}" in out
    assert max(map(len, out.splitlines())) < 120
    for e in student:
        (row,) = (line for line in out.splitlines() if re.match(rf"{e.recipe} +{e.kv_format} ", line))
        assert row.split()[-2:] == [f"{e.total / 2**30:.2f}", f"{8 - e.total / 2**30:+.2f}"]


def test_gb_and_gib_are_not_the_same(command):
    (gb, gib) = (command("--model", STUDENT, "--budget", f"8.2{unit}", "--batch", "4")[1] for unit in ("GB", "GiB"))
    assert re.search("best: (.*)", gb)[1] != re.search("best: (.*)", gib)[1]


def test_nothing_fits_is_one_sentence_with_the_smallest_total(command, student):
    code, out, err = command("--model", STUDENT, "--budget", "3GB", "--batch", "4", "--context", "4096")
    assert code == 1
    assert f"{min(e.total for e in student) / 1e9:.2f} GB" in err
    assert err.startswith("medkit: ") and err.count("\n") == 1
    assert "nf4_all" in out and "best:" not in out


def test_a_config_file_its_folder_and_a_known_name_are_the_same_model(command, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(memory_budget.KNOWN[STUDENT]))
    answers = [
        command("--model", model, "--budget", "8GB")[1].splitlines()[1:]
        for model in (str(tmp_path), str(tmp_path / "config.json"), STUDENT, f"deepseek-ai/{STUDENT}")
    ]
    assert all(answer == answers[0] for answer in answers)


def test_a_folder_that_transformers_wrote_is_read(command, tmp_path):
    LlamaConfig(hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4).save_pretrained(
        tmp_path
    )
    code, out, _ = command("--model", str(tmp_path), "--budget", "100GB", "--context", "512")
    assert code == 0
    assert "best: bf16, key-value cache in bf16" in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "no-such-model", "--budget", "8GB"], "no-such-model"),
        (["--model", "no-such-model", "--budget", "8GB"], STUDENT),
        (["--model", STUDENT, "--budget", "8"], "'8'"),
        (["--model", STUDENT, "--budget", "8GB", "--context", "200000"], "131072"),
        (["--model", "{}", "--budget", "8GB"], "config.json"),
    ],
)
def test_a_wrong_plan_is_one_sentence_and_exit_code_one(command, tmp_path, arguments, named):
    code, _, err = command(*(a.replace("{}", str(tmp_path)) for a in arguments))
    assert code == 1
    assert named in err
    assert err.startswith("medkit: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{not json", "config"),
        ("[1, 2]", "config"),
        ("{}", "config"),
        ('{"model_type": "no-such-type"}', "no-such-type"),
        ('{"model_type": "gpt2"}', "gpt2"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "hidden_size"),
    ],
)
def test_a_config_that_is_none_is_named(command, tmp_path, text, named):
    path = tmp_path / "config.json"
    path.write_text(text)
    code, _, err = command("--model", str(path), "--budget", "8GB")
    assert code == 1
    assert str(path) in err and named in err
    assert err.startswith("medkit: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        ({"rope_type": "yarn"}, "Missing required keys in `rope_parameters` for 'rope_type'='yarn': {'factor'}"),
        ({"type": "linear"}, "Missing required keys in `rope_parameters` for 'rope_type'='linear': {'factor'}"),
    ],
)
def test_an_incomplete_rope_is_told_as_it_is(command, tmp_path, rope, reason):
    (tmp_path / "config.json").write_text(json.dumps(memory_budget.KNOWN[STUDENT] | {"rope_scaling": rope}))
    code, _, err = command("--model", str(tmp_path), "--budget", "8GB")
    assert code == 1
    assert err.strip().endswith(f"is no model's config: {reason}")
    assert err.startswith("medkit: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("rope", "last"),
    [
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        ({"rope_type": "yarn", "factor": 4.0}, 131072),
        ({"type": "linear", "factor": 2}, 65536),
        ({"type": "dynamic", "factor": 2.0}, 65536),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8192}, 32768),
        ({"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}, 32768),
        ({"type": "default", "factor": 4.0}, 32768),
    ],
)  # fmt: skip
def test_a_rope_that_extends_the_context_is_believed(command, tmp_path, rope, last):
    config = memory_budget.KNOWN[STUDENT] | {"max_position_embeddings": 32768, "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ("--model", str(tmp_path), "--budget", "100GB", "--context")
    assert command(*arguments, str(last))[0] == 0
    code, _, err = command(*arguments, str(last + 1))
    assert (code, f"positions end at {last}" in err) == (1, True)


def test_gemma_3_says_how_far_it_was_extended():
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    rope = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    assert memory_budget.last_position(Gemma3TextConfig(max_position_embeddings=131072, rope_parameters=rope)) == 131072


@pytest.mark.parametrize("config", [GemmaConfig(), Gemma2Config(), Gemma3TextConfig()], ids=lambda c: c.model_type)
def test_any_gemma_is_planned_for(command, tmp_path, config):
    config.save_pretrained(tmp_path)
    code, out, err = command("--model", str(tmp_path), "--budget", "100GB")
    assert (code, err) == (0, "")
    assert "best: bf16" in out


@pytest.mark.parametrize("tied", [True, False])
def test_whatever_fits_the_room_for_a_plan_fits_the_total(tied):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, tie_word_embeddings=tied,
    )  # fmt: skip
    shapes = [weight for weight in memory_ledger.model_shapes(config) if len(weight.shape) == 2]
    totals, draw = [estimate.total for estimate in memory_budget.estimate(config, 2, 128)], random.Random(0)
    total = (min(totals) + max(totals)) // 2
    room = memory_budget.weight_budget(config, total, 2, 128)
    fitted = []
    for _ in range(200):
        schemes = {weight.module: draw.choice(["unquantized", "int8", "nf4"]) for weight in shapes}
        table = memory_ledger.plan_bytes(memory_ledger.model_shapes(config), schemes).set_index("component").bytes
        planned = int(table.sum() - table["norms"])
        estimate = memory_budget.estimate_plan(config, "drawn", schemes, 2, 128)
        assert estimate.weights + estimate.state == table.sum()
        if planned <= room:
            assert estimate.total <= total
            fitted.append(estimate.total)
    assert 0 < len(fitted) < 200
    assert max(fitted) > 0.9 * total


def test_a_total_that_not_even_nf4_fits_is_refused():
    config = memory_budget.read_config(STUDENT)
    with pytest.raises(ParamsError, match=r"quantization\.memory\.total_mb is 4000, .* takes 4749\.4 MB at batch 1"):
        memory_budget.weight_budget(config, 4e9, 1, 4096)
    assert memory_budget.weight_budget(config, 4750e6, 1, 4096) > 0
