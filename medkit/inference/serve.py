"""`medkit serve`: a thin router in front of llama.cpp's server with the edge file, or of any OpenAI-compatible server.

`chats` plans each chat. A choice is given with its confidence, or withheld below the least confidence of notebook 06.
The disclaimer is in a header and in the `metadata` of every chat answer, also of a stream's first chunk. All else,
sampling too, is left to the model's server. At / stands `chat_page.html`, on which a person can ask.
"""

import html
import json
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType

import gguf
import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from medkit.data.splits import SECOND_FORM
from medkit.inference.chats import Plan, make_plan
from medkit.inference.server_engine import ADAPTER_OFF, ServerAddress, llama_server
from medkit.inference.server_scoring import score_options
from medkit.inference.tasks import Task, describe, read_tasks
from medkit.prompts import LETTERS, answers
from medkit.stage import DISCLAIMER, MedkitError, Stage
from medkit.variants import ADAPTER, VARIANTS

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OWN_NAMES = ["127.0.0.1", "localhost", "[::1]"]  # without a key no web page may reach the server by another name
OWN_PAGES = r"https?://(127\.0\.0\.1|localhost|\[::1\])(:\d+)?"
PAGE = Path(__file__).with_name("chat_page.html")
PAGE_POLICY = "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
PAGE_POLICY += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
PUBLIC_PATHS = ("/health", "/v1/health")
OTHER_CHATS = ("/responses", "/messages", "/api/chat")  # of llama.cpp, where no plan is made
NO_CHATS = ("/completions", "/completion", "/infill", "/embeddings")
NO_ECHO = (
    "llama.cpp's server gives no log-probabilities of a prompt (`echo`): score options with the model's weights, "
    "as lm-eval does with --model hf"
)
MAX_BODY_BYTES = 4_000_000
PASSED_HEADERS = ("content-type", "retry-after")
TIMEOUT = httpx.Timeout(600.0, connect=10.0)
NO_IDLE = httpx.Limits(max_keepalive_connections=0)  # an idle connection occupies a thread of llama.cpp's for 5 s


def serve(run: str, host: str = "127.0.0.1", port: int = 8000, api_key: str | None = None, **options) -> None:
    """Answer OpenAI's clients until Ctrl-C, with these options of `open_router`.

    Raises MedkitError for an address that other machines can reach without an API key.
    """
    api_key = (api_key or "").strip() or None
    if host not in LOOPBACK and not api_key:
        raise MedkitError(f"--host {host} can be reached by other machines: set an API key in MEDKIT_API_KEY")
    with open_router(run, api_key, **options) as router:
        uvicorn.run(router, host=host, port=port, log_level="warning", server_header=False)


@contextmanager
def open_chat(run: str, upstream: str | None = None, upstream_key: str | None = None) -> Iterator[Callable[[str], str]]:
    """A function that answers one message as the server at / would. It raises MedkitError if no answer comes."""
    with open_router(run, None, upstream, upstream_key, 1) as router, TestClient(router, "http://localhost") as client:

        def answer(message: str) -> str:
            chat = {"model": "edge", "messages": [{"role": "user", "content": message}], "temperature": 0}
            body = client.post("/v1/chat/completions", json=chat).json()
            if "error" in body:
                raise MedkitError(f"no answer: {body['error']['message']}")
            return body["choices"][0]["message"]["content"]

        yield answer


@contextmanager
def open_router(
    run: str,
    api_key: str | None = None,
    upstream: str | None = None,
    upstream_key: str | None = None,
    slots: int = 4,
    context_tokens: int = 4096,
) -> Iterator[Starlette]:
    """The router before the run's edge file, or before the server at `upstream` (ends in /v1).

    `slots` and `context_tokens` are of llama.cpp's server (`server_engine.llama_server`), which ends with the block.
    """
    tasks, control, settings = None, [], {}
    if upstream:
        server = nullcontext(ServerAddress(upstream.rstrip("/"), (upstream_key or "none").strip()))
    else:
        stage, _, file = VARIANTS["edge"].folder.partition("/")
        if file not in Stage(run, stage).manifest().get("files", [file]):
            raise MedkitError(f"run {run!r} has no edge file (quantization.edge is null): name a server by --upstream")
        path = Stage(run, "05_inference").require(stage, file)
        tasks, control = read_tasks(path), control_tokens(path)
        adapter = path.with_name(ADAPTER) if any(task.kind == SECOND_FORM for task in tasks) else None
        settings = ADAPTER_OFF if adapter else {}
        server = llama_server(path, slots, context_tokens, adapter=adapter)
    with server as address:
        yield make_router(address, api_key, tasks, control, settings)


def control_tokens(path: Path) -> list[str]:
    """The control tokens of a GGUF file, such as <|im_end|>, which llama.cpp would read as such in a user's text."""
    reader = gguf.GGUFReader(path)
    tokens, kinds = (reader.get_field(f"tokenizer.ggml.{name}").contents() for name in ("tokens", "token_type"))
    return [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]


def make_router(
    upstream: ServerAddress,
    api_key: str | None = None,
    tasks: Sequence[Task] | None = None,
    control: Sequence[str] = (),
    settings: Mapping = MappingProxyType({}),
) -> Starlette:
    """The router as an ASGI application. `api_key` None lets everybody in who calls this machine by its own names.

    `tasks` are for `chats.make_plan`. A control token in a user's text is broken up by an invisible character.
    `settings` are added to each request that does not give them itself.
    """
    root = upstream.url.removesuffix("/v1")
    known_ids: dict[str, list[int]] = {}
    broken_up = {token: f"{token[0]}\N{WORD JOINER}{token[1:]}" for token in control}

    headers = {"authorization": f"Bearer {upstream.api_key}", "content-type": "application/json"}
    headers |= {"accept-encoding": "identity"}  # so that a stream can pass through as it is

    @asynccontextmanager
    async def lifespan(app: Starlette):
        options = {"base_url": root, "headers": headers, "timeout": TIMEOUT, "limits": NO_IDLE}
        async with httpx.AsyncClient(**options) as app.state.client:
            yield

    async def route(request: Request) -> Response:
        path = request.scope["path"]
        given_key = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key and path not in PUBLIC_PATHS and not secrets.compare_digest(given_key.encode(), api_key.encode()):
            return error_response(401, "the API key is wrong or missing", "authentication_error")
        body = await read_body(request)
        if body is None:
            return error_response(413, f"the request is larger than {MAX_BODY_BYTES} bytes", "invalid_request_error")
        if path.removeprefix("/v1").startswith(OTHER_CHATS):
            return error_response(404, "ask /v1/chat/completions", "invalid_request_error")
        client, plan = request.app.state.client, Plan({}, {})
        try:
            url = httpx.URL(path=path, query=request.scope["query_string"])
        except (httpx.InvalidURL, UnicodeError) as error:
            return error_response(400, f"the address is not valid: {error}", "invalid_request_error")
        try:
            if path.endswith("/chat/completions") and body:
                plan = make_plan({**settings, **read_object(body)}, tasks, broken_up)
                body = json.dumps(plan.chat).encode()
            elif path.endswith(NO_CHATS) and body and tasks is not None:
                asked = {**settings, **read_object(body)}
                if asked.get("echo"):
                    raise ValueError(NO_ECHO)
                body = json.dumps(asked).encode()
        except (ValueError, RecursionError) as error:
            return error_response(400, f"the body is not what {path} takes: {error}", "invalid_request_error")
        try:
            if plan.question and plan.question["options"]:
                plan = await choose(client, plan, known_ids)
            if not plan.asks_model:
                return write_answer(plan)
            asked = client.build_request(request.method, url, content=body)
            return await pass_on(await client.send(asked, stream=True), plan)
        except httpx.HTTPStatusError as error:  # an option was refused
            return error_response(error.response.status_code, error.response.text, "invalid_request_error")
        except httpx.RequestError as error:
            return error_response(502, f"the model's server does not answer: {type(error).__name__}", "server_error")
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            return error_response(502, f"the model's server does not answer with a chat: {error!r}", "server_error")

    pages = {"allow_origins": ["*"]} if api_key else {"allow_origin_regex": OWN_PAGES}
    checks = [Middleware(CORSMiddleware, **pages, allow_methods=["GET", "POST"], allow_headers=["*"])]
    if not api_key:
        checks.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=OWN_NAMES, www_redirect=False))
    about = "The model behind this server is not one of medkit's files." if tasks is None else describe(tasks)
    page = PAGE.read_text().replace("DISCLAIMER", html.escape(DISCLAIMER)).replace("ABOUT", html.escape(about))
    shown = HTMLResponse(page, headers={"content-security-policy": PAGE_POLICY})
    routes = [Route("/", lambda request: shown), Route("/{path:path}", route, methods=["GET", "POST"])]
    refuse = {405: lambda request, error: error_response(405, "use GET or POST", "invalid_request_error")}
    return Starlette(routes=routes, middleware=checks, lifespan=lifespan, exception_handlers=refuse)


async def read_body(request: Request) -> bytes | None:
    """The whole body; None if it is larger than MAX_BODY_BYTES."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            return None
    return body


def read_object(body: bytes) -> dict:
    """The request. Raises ValueError for a body that is no JSON object."""
    value = json.loads(body)
    if not isinstance(value, dict):
        raise ValueError("an object is needed")
    return value


async def choose(client: httpx.AsyncClient, plan: Plan, known_ids: dict) -> Plan:
    """The plan with the likeliest option and its probability as its text, or with a sentence if that is too low."""
    options, task, texts = plan.question["options"], plan.task, answers(plan.question, plan.template)
    scores = await score_options(client, plan.chat, texts, task.scoring, known_ids)
    if not all(map(math.isfinite, scores)):
        raise ValueError("its log-probabilities are not numbers")
    choice = max(range(len(scores)), key=scores.__getitem__)
    confidence, least = 1 / sum(math.exp(score - scores[choice]) for score in scores), task.least_confidence or 0.0
    letter = f"{LETTERS[choice]}. " if plan.question["listed"] else ""
    text = f"{letter}{options[choice]} (confidence {confidence:.2f})"
    if confidence < least:
        text = f"I am not sure enough to answer: my confidence is {confidence:.2f}, and I answer from {least:.2f} on."
    facts = plan.facts | {"task": task.source, "confidence": confidence, "withheld": confidence < least}
    return plan._replace(first="\n\n".join(filter(None, (plan.first, text))), facts=facts, asks_model=False)


def write_answer(plan: Plan) -> Response:
    """The plan's text as a chat answer, or as a stream of one chunk."""
    kind, part = ("chat.completion.chunk", "delta") if plan.chat.get("stream") else ("chat.completion", "message")
    turn = {part: {"role": "assistant", "content": plan.first}, "finish_reason": "stop", "logprobs": None}
    choices = [{"index": i, **turn} for i in range(count_answers(plan))]
    answer = in_openai_shape(plan, f"chatcmpl-{secrets.token_hex(8)}", kind, choices)
    if plan.chat.get("stream"):
        return Response(f"data: {json.dumps(answer)}\n\ndata: [DONE]\n\n", 200, headers_of(plan), "text/event-stream")
    usage = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), 0)
    return as_json(answer | {"usage": usage}, 200, headers_of(plan))


def count_answers(plan: Plan) -> int:
    """How many answers a chat wants (`n`)."""
    many = plan.chat.get("n")
    return many if type(many) is int and many in range(1, 17) else 1


def in_openai_shape(plan: Plan, name: str, kind: str, choices: list[dict]) -> dict:
    """A chat answer, or a chunk of one."""
    model = str(plan.chat.get("model") or "edge")
    answer = {"id": name, "object": kind, "created": int(time.time()), "model": model}
    return answer | {"choices": choices, "metadata": plan.facts}


async def pass_on(answer: httpx.Response, plan: Plan) -> Response:
    """The upstream's answer; a chat gets the plan's first text and its facts, a stream in one more chunk before it."""
    if answer.headers.get("content-encoding", "identity") != "identity":
        await answer.aclose()
        raise ValueError("it compresses its answers unasked")
    headers = {name: answer.headers[name] for name in PASSED_HEADERS if name in answer.headers} | headers_of(plan)
    is_chat = bool(plan.chat) and answer.is_success
    first = plan.first and f"{plan.first}\n\n"
    if not is_chat or not answer.headers.get("content-type", "").startswith("application/json"):

        async def chunks():
            async with aclosing(answer):
                if is_chat:
                    turn = {"delta": {"role": "assistant", "content": first}, "finish_reason": None}
                    deltas = [{"index": i, **turn} for i in range(count_answers(plan))]
                    chunk = in_openai_shape(plan, "medkit", "chat.completion.chunk", deltas)
                    yield f"data: {json.dumps(chunk)}\n\n".encode()
                async for chunk in answer.aiter_raw():
                    yield chunk

        return StreamingResponse(chunks(), answer.status_code, headers)
    async with aclosing(answer):
        body = json.loads(await answer.aread())
    for choice in body["choices"] if first else ():
        choice["message"]["content"] = first + (choice["message"].get("content") or "")
    body["metadata"] = (body.get("metadata") or {}) | plan.facts
    return as_json(body, answer.status_code, headers)


def headers_of(plan: Plan) -> dict[str, str]:
    """The router's own headers of an answer."""
    return {"x-medkit-disclaimer": DISCLAIMER} | ({"x-medkit-template": plan.template.name} if plan.template else {})


def as_json(body: dict, status: int, headers: Mapping) -> Response:
    """In ASCII, and NaN stays what it is: a model's server may write what strict JSON refuses."""
    return Response(json.dumps(body), status, {**headers, "content-type": "application/json"})


def error_response(status: int, message: str, kind: str) -> Response:
    """An error in OpenAI's shape, its message in one line."""
    error = {"message": str(MedkitError(message)), "type": kind, "param": None, "code": status}
    return as_json({"error": error}, status, {"x-medkit-disclaimer": DISCLAIMER})
