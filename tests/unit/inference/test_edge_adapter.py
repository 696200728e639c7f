"""The adapter beside the edge file: llama.cpp adds it to the requests that ask for it, and to no other one."""

import contextlib

import httpx
import pytest
import torch
from app_thread import running_app
from toys import attach_adapter

from medkit.inference import serve
from medkit.inference.server_engine import ADAPTER_OFF, llama_server
from medkit.inference.tasks import Task, recognise
from medkit.prompts import templates
from medkit.quantization import gguf_export
from medkit.quantization.gguf_export import ExportError

DIALOGUES = ["D: How old are you?\nP: I am 34.\nD: And the complaint?\nP: A cough.", "D: And the dose?\nP: 5 mg."]
TASKS = [
    Task(source=f"{kind}s", kind=kind, scoring="generated", metric="field_f1", value=0.8, n=60, options=[],
         least_confidence=None)
    for kind in templates.FORMS
]  # fmt: skip
TARGETS = ["q_proj", "k_proj", "o_proj", "down_proj"]
WANTED = {"max_tokens": 8, "temperature": 0, "response_format": {"type": "text"}}
WANTED |= dict.fromkeys(("ignore_eos", "verbose", "return_tokens"), True)


def write(model, prompt_ids, with_adapter: bool) -> list[int]:
    """The eight next tokens of torch, greedy; `ignore_eos` of llama.cpp forbids the tokens that end an answer."""
    settings = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [0, 2], "pad_token_id": 0}
    with torch.inference_mode(), contextlib.nullcontext() if with_adapter else model.disable_adapter():
        return model.generate(torch.tensor([prompt_ids]), **settings)[0, len(prompt_ids) :].tolist()


@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_the_second_form_is_written_with_the_adapter_and_all_else_without(make_llama, tokenizer, tmp_path, variant):
    """The prompts begin alike: what was read with the adapter must not serve a request without it."""
    model = attach_adapter(make_llama(), variant, TARGETS, 0.1)
    edge = gguf_export.export_gguf(make_llama(), tokenizer, tmp_path / "student.gguf")
    adapter = gguf_export.export_adapter(model, tmp_path / "adapter.gguf")
    asked = [("record_b", 0), ("record", 0), ("record_b", 0), ("record", 1), ("record", 0), ("record_b", 1)]
    with (
        llama_server(edge, 1, 1024, threads=1, adapter=adapter) as upstream,
        running_app(serve.make_router(upstream, None, TASKS, settings=ADAPTER_OFF)) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        for kind, number in asked:
            message = f"{DIALOGUES[number]}\n\n{templates.TEMPLATES[kind].instruction}"
            chat = {"messages": [{"role": "user", "content": message}], **WANTED}
            answer = client.post("/v1/chat/completions", json=chat).json()
            found = answer["__verbose"]["tokens"]
            row = {"question": DIALOGUES[number], "context": "", "options": []}
            prompt_ids, _ = templates.encode(tokenizer, templates.render(row, templates.TEMPLATES[kind]))
            assert found == write(model, prompt_ids, with_adapter=kind == "record_b")
        asked = {"prompt": prompt_ids, "n_predict": 8, "temperature": 0, "ignore_eos": True, "return_tokens": True}
        found = client.post("/completion", json=asked).json()["tokens"]
        assert found == write(model, prompt_ids, with_adapter=False) != write(model, prompt_ids, with_adapter=True)
        assert client.post("/completion", json=[asked]).status_code == 400
    adapter.write_bytes(adapter.read_bytes()[:-1])
    cut = llama_server(edge, adapter=adapter)
    with pytest.raises(ExportError, match=r"adapter\.gguf is missing, cut or changed"), cut:
        pass


def test_the_form_is_chosen_by_the_last_words():
    for kind in templates.FORMS:
        message = f"{DIALOGUES[0]}\n{templates.TEMPLATES[kind].instruction}\n"
        task, row = recognise(message, TASKS)
        assert (task.kind, row["question"]) == (kind, DIALOGUES[0])
    assert recognise(message, TASKS[:1]) is None or recognise(message, TASKS[:1])[0].kind == "record"


def test_dora_is_refused(make_llama, tmp_path):
    with pytest.raises(ExportError, match=r"'dora' has norms, .* choose 'lora'"):
        gguf_export.export_adapter(attach_adapter(make_llama(), "dora", TARGETS), tmp_path / "adapter.gguf")
    assert not list(tmp_path.iterdir())
