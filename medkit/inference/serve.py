"""`medkit serve`: a thin router in front of llama.cpp's server, or of any OpenAI-compatible server.

The router puts the last question of a chat into the template of its problem type, and adds the disclaimer: in a header
always, and in the `metadata` of a chat answer that is no stream. All else passes through untouched.
"""

import json
import re
import secrets
from contextlib import asynccontextmanager, nullcontext

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from medkit.data.problem_types import classify_by_keywords
from medkit.inference.server_engine import ServerAddress, llama_server
from medkit.prompts import templates
from medkit.stage import DISCLAIMER, MedkitError, Stage
from medkit.variants import VARIANTS

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OWN_NAMES = ["127.0.0.1", "localhost", "[::1]"]  # without a key no web page may reach the server by another name
PUBLIC_PATHS = ("/health", "/v1/health")
MAX_BODY_BYTES = 4_000_000
PASSED_HEADERS = ("content-type", "retry-after")
TIMEOUT = httpx.Timeout(600.0, connect=10.0)
_LISTED_OPTIONS = re.compile(r"^\s*A[.):]\s.*^\s*B[.):]\s", re.MULTILINE | re.DOTALL)


def serve(
    run: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    upstream: str | None = None,
    upstream_key: str | None = None,
    slots: int = 4,
    context_tokens: int = 4096,
) -> None:
    """Answer OpenAI's clients until Ctrl-C: with the run's edge file, or with the server at `upstream` (ends in /v1).

    `slots` and `context_tokens` are of llama.cpp's server (`server_engine.llama_server`). Raises MedkitError for an
    address that other machines can reach without an API key.
    """
    if host not in LOOPBACK and not api_key:
        raise MedkitError(f"--host {host} can be reached by other machines: set an API key in MEDKIT_API_KEY")
    if upstream:
        server = nullcontext(ServerAddress(upstream.rstrip("/"), upstream_key or "none"))
    else:
        stage, _, file = VARIANTS["edge"].folder.partition("/")
        server = llama_server(Stage(run, "05_inference").require(stage, file), slots, context_tokens)
    with server as address:
        uvicorn.run(make_router(address, api_key), host=host, port=port, log_level="warning", server_header=False)


def make_router(upstream: ServerAddress, api_key: str | None = None) -> Starlette:
    """The router as an ASGI application. `api_key` None lets everybody in who calls this machine by its own names."""
    root = upstream.url.removesuffix("/v1")

    @asynccontextmanager
    async def lifespan(app: Starlette):
        async with httpx.AsyncClient(base_url=root, timeout=TIMEOUT) as app.state.client:
            yield

    async def route(request: Request) -> Response:
        path = request.url.path
        given_key = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key and path not in PUBLIC_PATHS and not secrets.compare_digest(given_key.encode(), api_key.encode()):
            return error_response(401, "the API key is wrong or missing", "authentication_error")
        body = await read_body(request)
        if body is None:
            return error_response(413, f"the request is larger than {MAX_BODY_BYTES} bytes", "invalid_request_error")
        template = None
        if path.endswith("/chat/completions") and body:
            try:
                body, template = apply_template(body)
            except ValueError as error:
                return error_response(400, f"the body is not a chat in JSON: {error}", "invalid_request_error")
        headers = {"authorization": f"Bearer {upstream.api_key}", "content-type": "application/json"}
        url = httpx.URL(path=path, query=request.url.query.encode())
        asked = request.app.state.client.build_request(request.method, url, content=body, headers=headers)
        try:
            answer = await request.app.state.client.send(asked, stream=True)
        except httpx.TransportError as error:
            return error_response(502, f"the model's server does not answer: {error!r}", "server_error")
        return await pass_on(answer, template)

    names = [] if api_key else [Middleware(TrustedHostMiddleware, allowed_hosts=OWN_NAMES, www_redirect=False)]
    return Starlette(
        routes=[Route("/{path:path}", route, methods=["GET", "POST"])],
        middleware=names,
        lifespan=lifespan,
        exception_handlers={
            405: lambda request, error: error_response(405, "use GET or POST", "invalid_request_error")
        },
    )


async def read_body(request: Request) -> bytes | None:
    """The whole body; None if it is larger than MAX_BODY_BYTES."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            return None
    return body


def apply_template(body: bytes) -> tuple[bytes, str | None]:
    """The request with its last question in a template, and the template's name.

    A chat with a system message of its own, or one that does not end with a user's text, stays as it is (None). Raises
    ValueError for a body that is no JSON object with messages.
    """
    chat = json.loads(body)
    if not isinstance(chat, dict) or not isinstance(turns := chat.get("messages"), list):
        raise ValueError("an object with a list of messages is needed")
    last = turns[-1] if turns and isinstance(turns[-1], dict) else {}
    has_system = any(isinstance(turn, dict) and turn.get("role") in ("system", "developer") for turn in turns)
    if has_system or last.get("role") != "user" or not isinstance(last.get("content"), str):
        return body, None
    template = pick_template(last["content"])
    system, question = templates.render({"context": "", "question": last["content"], "options": []}, template)
    return json.dumps(chat | {"messages": [system, *turns[:-1], question]}).encode(), template.name


def pick_template(question: str) -> templates.Template:
    """The letter template if the question lists its options, else the template of its problem type (by keywords)."""
    return templates.LETTER if _LISTED_OPTIONS.search(question) else templates.OPEN[classify_by_keywords(question)]


async def pass_on(answer: httpx.Response, template: str | None) -> Response:
    """The upstream's answer with the disclaimer; streams and errors keep their body."""
    headers = {name: answer.headers[name] for name in PASSED_HEADERS if name in answer.headers}
    headers |= {"x-medkit-disclaimer": DISCLAIMER} | ({"x-medkit-template": template} if template else {})
    is_json = answer.headers.get("content-type", "").startswith("application/json")
    if not (is_json and answer.is_success and answer.request.url.path.endswith("/chat/completions")):

        async def chunks():
            try:
                async for chunk in answer.aiter_bytes():
                    yield chunk
            finally:
                await answer.aclose()

        return StreamingResponse(chunks(), answer.status_code, headers)
    body = json.loads(await answer.aread())
    await answer.aclose()
    body["metadata"] = {**(body.get("metadata") or {}), "disclaimer": DISCLAIMER}
    return JSONResponse(body, answer.status_code, headers)


def error_response(status: int, message: str, kind: str) -> JSONResponse:
    """An error in OpenAI's shape."""
    error = {"message": message, "type": kind, "param": None, "code": status}
    return JSONResponse({"error": error}, status, {"x-medkit-disclaimer": DISCLAIMER})
