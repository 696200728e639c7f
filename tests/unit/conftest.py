"""Toys for the unit tests: models and tokenizers (tests/toys.py), examples, questions.

Fixtures that make things are functions, so that a test says what is particular about its model on the line that asks.
"""

import json
import random
import socket
import sys

import pandas as pd
import pytest
import toys
from toys import SENTENCES, VOCAB


@pytest.fixture(scope="module")
def no_network():
    """Connections that were tried by the tests of a module; none is made, whatever the environment allows."""
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError("no network in this test")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("CI", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
            patch.delenv(name, raising=False)
        patch.setattr(socket, "getaddrinfo", refuse)
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, refuse)
        yield tried


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """The folder of runs of a test, which is not there yet; no runner has started the process."""
    from medkit.stage import FINGERPRINT

    monkeypatch.setenv("MEDKIT_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.delenv(FINGERPRINT, raising=False)
    return tmp_path / "outputs"


@pytest.fixture
def command(monkeypatch, capsys):
    """command(*words): exit code, output and errors of `python -m medkit …`, run in this process."""
    from medkit import __main__

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medkit", *words])
        with pytest.raises(SystemExit) as stopped:
            __main__.main()
        printed = capsys.readouterr()
        return stopped.value.code or 0, printed.out, printed.err

    return run


@pytest.fixture
def make_notebooks(tmp_path, monkeypatch):
    """make_notebooks({stage: [cells…]}): a project of its own for the runner, with these stages and notebooks."""
    from nbformat import v4, write

    from medkit import runner

    folder = tmp_path / "toy" / "notebooks"
    folder.mkdir(parents=True)
    monkeypatch.setattr(runner, "ROOT", folder.parent)
    parameters = "params_file = ''\nrun = ''\noverrides = {}"

    def make(notebooks: dict[str, list[str]]) -> None:
        monkeypatch.setattr(runner, "STAGES", list(notebooks))
        for name, sources in notebooks.items():
            cells = [v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}), *map(v4.new_code_cell, sources)]
            notebook = v4.new_notebook(cells=cells)
            notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
            write(notebook, folder / f"{name}.ipynb")

    return make


@pytest.fixture(scope="session")
def make_llama():
    return toys.make_llama


@pytest.fixture(scope="session")
def make_tokenizer():
    return toys.make_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return toys.make_tokenizer()


@pytest.fixture(scope="session")
def thinker():
    """The tokenizer of a model that thinks: both marks of a thought are tokens."""
    tokenizer = toys.make_tokenizer(chat_template=toys.THINKING)
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


@pytest.fixture(scope="session")
def make_pieces_tokenizer():
    """pieces(texts, lead=False, byte_fallback=True): SentencePiece-like BPE over "▁" pieces, no regex split."""
    from tokenizers import Tokenizer, decoders, normalizers, trainers
    from tokenizers import models as backends
    from transformers import PreTrainedTokenizerFast

    def make(texts=SENTENCES, lead=False, byte_fallback=True):
        backend = Tokenizer(backends.BPE(unk_token="<unk>"))
        steps = [normalizers.Prepend("▁")] * lead + [normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(steps)
        special = ["<pad>", "</s>", "<unk>"]
        trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False, limit_alphabet=60)
        backend.train_from_iterator([*texts] * 10, trainer)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * lead)
        if byte_fallback:
            state = json.loads(backend.to_str())
            vocab = state["model"]["vocab"]
            vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
            state["model"]["byte_fallback"] = True
            backend = Tokenizer.from_str(json.dumps(state))
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")

    return make


@pytest.fixture(scope="session")
def make_examples():
    """examples(count, seed=0): random sequences of 6 to 24 tokens, half of them or less to be predicted."""
    from medkit.modeling.batches import Example

    def make(count, seed=0):
        draw = random.Random(seed)
        lengths = [draw.randint(6, 24) for _ in range(count)]
        return [Example([draw.randrange(3, VOCAB) for _ in range(n)], draw.randint(n // 2, n - 1)) for n in lengths]

    return make


@pytest.fixture(scope="session")
def make_section():
    """section(**changes): a small `TrainParams`."""
    from medkit.params import TrainParams

    def make(**changes):
        settings = {"epochs": 2.0, "batch_size": 4, "slice_tokens": 512, "learning_rate": 1e-3, "warmup_fraction": 0.1}
        settings |= {"save_every_steps": 2, "bf16": False, "gradient_checkpointing": False}
        return TrainParams(**{**settings, **changes})

    return make


@pytest.fixture(scope="session")
def models_params():
    from medkit.params import Local, ModelParams, ModelsParams

    teacher = ModelParams(source=Local(kind="local", path="."), keep_layers=[])
    sides = {"teacher": teacher, "student": "pruned_teacher", "embedder": teacher.source}
    return ModelsParams(**sides, device="cpu", dtype="float32", attention="sdpa")


@pytest.fixture
def questions():
    """A questions table: two exam questions and an abstract with answers, a transfer question without."""
    vitamins, hormones = ["vitamin A", "vitamin C", "vitamin D", "zinc"], ["insulin", "glucagon", "cortisol"]
    trial = "120 patients were given 325 mg."
    rows = [
        ("q0", "exam", "test", "choice", "Which vitamin prevents scurvy?", "", vitamins, 1),
        ("q1", "exam", "test", "choice", "Which hormone lowers glucose?", "", hormones, 0),
        ("q2", "trial", "test", "abstract", "Does aspirin reduce fever?", trial, ["yes", "no", "maybe"], 0),
        ("q3", "exam", "transfer", "choice", "Which organ makes bile?", "", ["liver", "heart"], -1),
    ]
    columns = ["id", "source", "split", "kind", "question", "context", "options", "answer"]
    return pd.DataFrame(rows, columns=columns).assign(group=range(len(rows)), subject="", clean=True)
