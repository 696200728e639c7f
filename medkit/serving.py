"""An engine on a port: OpenAI's completions and chat completions, with limits, metrics and an orderly end.

Greedy, one answer per request, one model. No TLS and no accounts: put a proxy before it to show it to the world.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import uvicorn
from jinja2 import TemplateError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from medkit import engines, prompts
from medkit.engines import Engine, EngineError
from medkit.outputs import DISCLAIMER
from medkit.serving_cache import AnswerCache, Lookup
from medkit.serving_http import (
    Admission,
    Connection,
    Count,
    Events,
    Gate,
    OwnNames,
    Server,
    receive_body,
    show_bug,
    show_error,
    show_http_error,
    unless_gone,
)
from medkit.serving_queue import EngineQueue, Limits
from medkit.serving_schema import CLIENT_GONE, ApiError, Ask, Body, ChatBody, CompletionBody, read_body
from medkit.serving_text import TextStream, apply_template, token_names

__all__ = ["Limits", "create_app", "make_server", "serve"]
KEEP_ALIVE_S = 30
Piece = tuple[str, list[int], str | None]
"""Text that is certain now, the tokens behind it, and at the end the reason of the end."""


def create_app(
    engine: Engine, tokenizer, *, model_name: str, limits: Limits, api_key: str | None = None, cached_answers: int = 0
) -> Starlette:
    """The app; it closes the engine when it shuts down. With a key every route but /health asks for it, without one no
    request is answered that names another host than this machine.

    So many whole answers are kept and given again to the very same request, without the engine; `x-medkit-cache` tells.
    """
    held = getattr(engine, "max_tokens", None) or limits.context_tokens
    line = EngineQueue(engine, replace(limits, context_tokens=min(limits.context_tokens, held)))
    model = f"{model_name} by {engine.name}"
    cache = AnswerCache(cached_answers, model, line.metrics.registry) if cached_answers else None
    service = _Service(line, tokenizer, model_name, cache)
    gate, admission = Middleware(Gate, api_key=api_key), Middleware(Admission, line=line)
    asking = {"methods": ["POST"], "middleware": [gate, admission]}

    @asynccontextmanager
    async def lifespan(app: Starlette):
        line.start()
        yield
        await line.close()

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", service.chat, **asking),
            Route("/v1/completions", service.complete, **asking),
            Route("/v1/models", service.models, middleware=[gate]),
            Route("/v1/models/{name:path}", service.models, middleware=[gate]),
            Route("/metrics", service.metrics, middleware=[gate]),
            Route("/health", service.health),
        ],
        middleware=[Middleware(Count, line=line), *([] if api_key else [Middleware(OwnNames)])],
        exception_handlers={ApiError: show_error, HTTPException: show_http_error, Exception: show_bug},
        lifespan=lifespan,
    )
    app.state.line, app.state.has_key = line, bool(api_key)
    return app


class _Service:
    """The routes."""

    def __init__(self, line: EngineQueue, tokenizer, model_name: str, cache: AnswerCache | None):
        self.line, self.limits, self.tokenizer, self.model_name = line, line.limits, tokenizer, model_name
        self.cache = cache
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")  # long prompts must not stop the loop

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, ChatBody)

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, CompletionBody)

    async def models(self, request: Request) -> Response:
        name = request.path_params.get("name")
        self._check_model(self.model_name if name is None else name)
        model = {"id": self.model_name, "object": "model", "created": 0, "owned_by": "medkit"}
        model |= {"max_model_len": self.limits.context_tokens, "disclaimer": DISCLAIMER}
        return JSONResponse(model if name else {"object": "list", "data": [model]}, headers=_headers())

    async def health(self, request: Request) -> Response:
        if getattr(self.line.engine, "ended", False):
            raise ApiError(503, "the engine has died and answers no more; start the server again", code="engine_ended")
        return JSONResponse({"status": "ok", "running": self.line.running})

    async def metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.line.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    # --- one answer ---

    async def _answer(self, request: Request, kind: type[Body]) -> Response:
        body = read_body(kind, await receive_body(request, self.limits))
        self._check_model(body.model)
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self.limits.request_timeout_s
        ask = await loop.run_in_executor(self.reader, self._read, body)
        if ask.top_logprobs:
            return JSONResponse(await unless_gone(request, self._echo(ask, body, deadline_s)), headers=_headers())
        lookup = self.cache.look_up(ask) if self.cache else None
        headers = _headers(ask.template) | (lookup.headers if lookup else {})
        pieces = self._pieces(ask, lookup, deadline_s)
        if body.stream:
            return Events(self._events(ask, pieces, request.scope), headers=headers)
        return JSONResponse(await unless_gone(request, self._whole(ask, pieces)), headers=headers)

    def _check_model(self, name: str) -> None:
        if name != self.model_name:
            message = f"the model {name!r} is not served here; ask for {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _read(self, body: ChatBody | CompletionBody) -> Ask:
        """Token ids and limits of a body. Raises ApiError (400) if prompt and answer do not fit the model."""
        template, wanted, top_logprobs = None, body.max_tokens, None
        if chat := isinstance(body, ChatBody):
            turns = [message.as_turn() for message in body.messages]
            if turns[-1]["role"] != "user":
                raise ApiError(400, "the last message must be the user's: it is the one answered", param="messages")
            turns, template = apply_template(turns)
            try:
                prompt_ids = prompts.encode(self.tokenizer, turns)[0]
            except TemplateError as error:
                raise ApiError(400, f"the model's chat template refuses this chat: {error}", param="messages") from None
            wanted = body.max_completion_tokens or wanted
        else:
            top_logprobs = body.top_logprobs()
            text = isinstance(body.prompt, str)
            prompt_ids = self.tokenizer(body.prompt).input_ids if text else list(body.prompt)
        if not prompt_ids or max(prompt_ids) >= len(self.tokenizer):
            allowed = f"ids from 0 to {len(self.tokenizer) - 1}"
            raise ApiError(
                400, f"the prompt is empty or holds an unknown token; send text, or {allowed}", param="prompt"
            )
        room = self.limits.context_tokens - len(prompt_ids)
        length = min(self.limits.chat_tokens, max(room, 1)) if wanted is None else wanted
        if length > room:
            raise ApiError(
                400,
                f"the prompt has {len(prompt_ids)} tokens and {length} are asked for, together more than the "
                f"{self.limits.context_tokens} that fit; shorten the prompt or lower max_tokens",
                param="max_tokens"
                if len(prompt_ids) < self.limits.context_tokens
                else "messages"
                if chat
                else "prompt",
                code="context_length_exceeded",
            )
        own = () if body.ignore_eos else (self.tokenizer.eos_token_id,)
        return Ask(
            engines.Request(prompt_ids, length, end_ids=(*own, *(body.stop_token_ids or ()))),
            chat,
            self.model_name,
            template,
            body.stops(),
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
            token_ids=bool(body.return_token_ids),
            top_logprobs=top_logprobs,
        )

    async def _echo(self, ask: Ask, body: CompletionBody, deadline_s: float) -> dict:
        """The prompt as it was read, with its log-probabilities."""
        said = await self.line.prompt_logprobs(ask.request, ask.top_logprobs, deadline_s)

        def write() -> dict:
            names = token_names(self.tokenizer, bool(body.return_tokens_as_token_ids))
            return ask.echoed(said, self.tokenizer.decode(ask.request.prompt_ids), names)

        return await asyncio.get_running_loop().run_in_executor(self.reader, write)

    async def _pieces(self, ask: Ask, lookup: Lookup | None, deadline_s: float) -> AsyncIterator[Piece]:
        """Text and token as they come, and at last the reason why no more come."""
        text, written = TextStream(self.tokenizer, ask.stops), []
        hit = lookup is not None and lookup.found is not None
        async with aclosing(lookup.replay() if hit else self.line.tokens(ask.request, deadline_s)) as tokens:
            async for token in tokens:
                written.append(token)
                yield text.push(token), [token], None
                if text.stopped:
                    break
        ended = text.stopped or (bool(written) and written[-1] in ask.request.end_ids)
        if lookup is not None and (ended or len(written) == ask.request.max_new_tokens):
            lookup.keep(written)  # whoever leaves or fails does not come this far
        yield "" if text.stopped else text.flush(), [], "stop" if ended else "length"

    async def _whole(self, ask: Ask, pieces: AsyncIterator[Piece]) -> dict:
        async with aclosing(pieces):
            texts, token_ids, reasons = zip(*[piece async for piece in pieces], strict=True)
        return ask.whole("".join(texts), [i for ids in token_ids for i in ids], reasons[-1])

    async def _events(self, ask: Ask, pieces: AsyncIterator[Piece], scope) -> AsyncIterator[str]:
        """Server-sent events: one per token, even if its text is still to come.

        An error is the last event. Raises ApiError for one that comes before the first.
        """
        written, first = 0, True
        try:
            async with aclosing(pieces):
                async for text, token_ids, reason in pieces:
                    written += len(token_ids)
                    yield _event(ask.chunk(text, token_ids, reason, first))
                    first = False
        except ApiError as error:
            if first:
                raise
            scope["outcome"] = error.status
            yield _event(error.body())
            return
        except (asyncio.CancelledError, GeneratorExit):
            scope["outcome"] = CLIENT_GONE
            raise
        if ask.include_usage:
            yield _event(ask.usage_chunk(written))
        yield "data: [DONE]\n\n"


def _event(value: dict) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _headers(template: str | None = None) -> dict[str, str]:
    return {"x-medkit-disclaimer": DISCLAIMER} | ({"x-medkit-template": template} if template else {})


# --- the server ------------------------------------------------------------------------------------------------------


def make_server(app: Starlette, host: str = "127.0.0.1", port: int = 8000) -> uvicorn.Server:
    """A server that is not running yet. Raises EngineError for an address others reach while there is no API key."""
    if not app.state.has_key and not _is_loopback(host):
        raise EngineError(
            f"serving on {host} would let everyone who reaches it in; give an API key (MEDKIT_API_KEY) or use 127.0.0.1"
        )
    return Server(
        uvicorn.Config(
            app,
            host,
            port,
            http=Connection,
            ws="none",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=round(app.state.line.limits.grace_s) + 5,  # abandoned answers end well before
        )
    )


def serve(app: Starlette, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve until SIGTERM or SIGINT, then let running answers end, close the engine and return."""
    make_server(app, host, port).run()


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
