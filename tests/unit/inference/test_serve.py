"""The router before llama.cpp's own server on a toy file, as OpenAI's client sees it."""

import json
import threading
import time
from types import SimpleNamespace

import httpx
import openai
import pytest
import uvicorn

from medkit.inference import serve
from medkit.inference.server_engine import ServerAddress, llama_server
from medkit.prompts import templates
from medkit.quantization import gguf_export
from medkit.stage import DISCLAIMER, MedkitError, StageError

KEY = "secret"
QUESTION = "What should I do after an overdose of paracetamol?"


@pytest.fixture(scope="module")
def upstream(make_llama, tokenizer, tmp_path_factory):
    path = gguf_export.export_gguf(make_llama(), tokenizer, tmp_path_factory.mktemp("edge") / "student.gguf", "F16")
    with llama_server(path, slots=2, context_tokens=1024, threads=1) as address:
        yield address


@pytest.fixture(scope="module")
def start():
    """start(upstream, api_key): the URL of a router; all are stopped at the end."""
    servers = []

    def make(upstream, api_key=None):
        config = uvicorn.Config(
            serve.make_router(upstream, api_key), port=0, log_level="error", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        servers.append((server, thread := threading.Thread(target=server.run, daemon=True)))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield make
    for server, thread in servers:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def url(start, upstream):
    return start(upstream, KEY)


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def ask(client, content=QUESTION, **more):
    settings = {"model": "edge", "max_tokens": 6, "temperature": 0} | more
    return client.chat.completions.with_raw_response.create(messages=[{"role": "user", "content": content}], **settings)


def test_a_chat_gets_the_template_of_its_problem_and_the_disclaimer(client, tokenizer):
    raw = ask(client)
    answer = raw.parse()
    assert raw.headers["x-medkit-template"] == "emergency"
    assert raw.headers["x-medkit-disclaimer"] == answer.metadata["disclaimer"] == DISCLAIMER
    messages = templates.render({"context": "", "question": QUESTION, "options": []}, templates.OPEN["emergency"])
    prompt_ids, _ = templates.encode(tokenizer, messages)
    assert answer.usage.prompt_tokens == len(prompt_ids)
    same = client.completions.create(model="edge", prompt=prompt_ids, max_tokens=6, temperature=0)
    assert answer.choices[0].message.content.strip() == same.choices[0].text.strip()


@pytest.mark.parametrize(
    ("content", "template"),
    [("Which one?\nA. insulin\nB. glucagon", "letter"), ("How is aspirin taken?", "medication"), ("Hello", "other")],
)
def test_templates_are_picked_by_the_question(content, template):
    body, name = serve.apply_template(json.dumps({"messages": [{"role": "user", "content": content}], "n": 1}).encode())
    chat = json.loads(body)
    assert name == template and chat["n"] == 1 and [turn["role"] for turn in chat["messages"]] == ["system", "user"]


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}],
        [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Call"}],
        [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}],
    ],
)
def test_other_chats_stay_as_they_are(turns):
    body = json.dumps({"messages": turns}).encode()
    assert serve.apply_template(body) == (body, None)


def test_a_stream_passes_through_untouched(client, url):
    whole = ask(client).parse().choices[0].message.content
    raw = ask(client, stream=True)
    pieces = [choice.delta.content or "" for chunk in raw.parse() for choice in chunk.choices]
    assert "".join(pieces) == whole and len(pieces) > 2
    assert raw.headers["x-medkit-disclaimer"] == DISCLAIMER


def test_other_paths_pass_through_untouched(url, upstream, client):
    assert [model.id for model in client.models.list()] == ["edge"]
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}  # without a key
    headers = {"authorization": f"Bearer {KEY}"}
    assert "llamacpp" in httpx.get(f"{url}/metrics", headers=headers).text
    asked = {"content": "Is it safe?"}
    direct = httpx.post(
        upstream.url.replace("/v1", "/tokenize"), json=asked, headers={"authorization": f"Bearer {upstream.api_key}"}
    )
    assert httpx.post(f"{url}/tokenize", json=asked, headers=headers).content == direct.content
    schema = {"type": "object", "properties": {"dose": {"type": "integer"}}, "required": ["dose"]}
    form = {"type": "json_schema", "json_schema": {"name": "dose", "schema": schema}}
    answer = ask(client, response_format=form, max_tokens=60).parse().choices[0]
    assert answer.finish_reason == "length" or isinstance(json.loads(answer.message.content)["dose"], int)


def test_errors_have_the_shape_of_openai(client, url, start, monkeypatch):
    with pytest.raises(openai.AuthenticationError, match="the API key is wrong or missing"):
        ask(client.with_options(api_key="guessed"))
    with pytest.raises(openai.BadRequestError, match="exceed"):  # llama.cpp's own error
        client.completions.create(model="edge", prompt=[5] * 2000, max_tokens=1)
    headers = {"authorization": f"Bearer {KEY}"}
    refused = httpx.post(f"{url}/v1/chat/completions", content=b"[1", headers=headers)
    assert refused.status_code == 400 and "not a chat in JSON" in refused.json()["error"]["message"]
    monkeypatch.setattr(serve, "MAX_BODY_BYTES", 100)
    refused = httpx.post(f"{url}/v1/completions", json={"prompt": "x" * 200}, headers=headers)
    assert refused.status_code == 413 and refused.json()["error"]["type"] == "invalid_request_error"
    assert httpx.put(f"{url}/v1/models", headers=headers).json()["error"]["code"] == 405
    gone = start(ServerAddress("http://127.0.0.1:9/v1", "none"), KEY)
    answer = httpx.get(f"{gone}/v1/models", headers=headers)
    assert answer.status_code == 502 and "does not answer" in answer.json()["error"]["message"]


def test_without_a_key_only_the_names_of_this_machine_are_answered(start, upstream):
    url = start(upstream)
    assert httpx.get(f"{url}/v1/models").status_code == 200
    assert httpx.get(f"{url}/v1/models", headers={"host": "evil.example:8000"}).status_code == 400


@pytest.fixture
def served(monkeypatch):
    """What `serve` starts, and where."""
    seen = SimpleNamespace()
    monkeypatch.setattr(serve.uvicorn, "run", lambda app, **settings: vars(seen).update(settings))

    class Server:
        def __init__(self, path, slots, context_tokens):
            seen.path, seen.slots = path, slots

        def __enter__(self):
            return ServerAddress("http://127.0.0.1:9/v1", "none")

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(serve, "llama_server", Server)
    return seen


def test_serve_takes_the_edge_file_of_the_run_and_no_profile(served, monkeypatch, tmp_path):
    """A profile given at the command line could load other layers than the run's; the file holds what the run made."""
    monkeypatch.setenv("MEDKIT_OUTPUTS", str(tmp_path))
    with pytest.raises(StageError, match=r"edge/student\.gguf is not there: run notebook 01_data first"):
        serve.serve("mine")
    edge = tmp_path / "mine" / "04_quantization" / "edge" / "student.gguf"
    edge.parent.mkdir(parents=True)
    edge.write_bytes(b"x")
    (edge.parents[1] / "manifest.json").write_text(json.dumps({"files": {"edge/student.gguf": 1}}))
    serve.serve("mine", port=8001, slots=3)
    assert served.path == edge and (served.slots, served.port, served.host) == (3, 8001, "127.0.0.1")
    serve.serve("nothing", upstream="http://127.0.0.1:9/v1", port=8002)
    assert served.port == 8002


def test_an_address_for_others_needs_a_key(served):
    with pytest.raises(MedkitError, match=r"--host 0\.0\.0\.0 .* set an API key in MEDKIT_API_KEY"):
        serve.serve("mine", host="0.0.0.0", upstream="http://127.0.0.1:9/v1")
    serve.serve("mine", host="0.0.0.0", api_key=KEY, upstream="http://127.0.0.1:9/v1")
    assert served.host == "0.0.0.0"
