"""What surrounds the app: host, key and line before a route, bodies with a limit, streams that end with their client.

Connections that stall are cut, so that nobody holds a place for nothing. No model and no text here.
"""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import AsyncIterator
from contextlib import aclosing

import uvicorn
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from medkit.serving_queue import EngineQueue, Limits
from medkit.serving_schema import CLIENT_GONE, ApiError

SILENCE_S = 60.0  # a connection that neither brings a request nor takes its answer for so long is cut
OWN_NAMES = re.compile(r"(localhost|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]+)?", re.IGNORECASE)  # and a port


# --- before a route ----------------------------------------------------------------------------------------------


class OwnNames:
    """Refuses who asks for another host than this machine (403).

    Whoever owns a name can let it point to 127.0.0.1; to a browser a page from there then has the server's own origin.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        app = self.app
        if scope["type"] == "http" and not OWN_NAMES.fullmatch(Request(scope).headers.get("host", "")):
            message = "without an API key only requests to localhost, 127.0.0.1 or [::1] are answered; ask one of these"
            app = await show_error(Request(scope), ApiError(403, message))
        await app(scope, receive, send)


class Gate:
    """Asks for the key (401) and for JSON (415: a web page of somebody else cannot send that unasked)."""

    def __init__(self, app, api_key: str | None = None):
        self.app, self.api_key = app, api_key

    async def __call__(self, scope, receive, send) -> None:
        request = Request(scope)
        scheme, _, sent = request.headers.get("authorization", "").partition(" ")
        if self.api_key and not (
            scheme.lower() == "bearer"
            and hmac.compare_digest(sent.encode("latin-1"), self.api_key.encode())  # headers are bytes
        ):
            message = "the API key is missing or wrong; send `Authorization: Bearer <key>`"
            raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.method == "POST" and media_type != "application/json":
            raise ApiError(415, "the body must be JSON; send `Content-Type: application/json`")
        await self.app(scope, receive, send)


class Admission:
    """Holds a place in line from before the body is read until the answer is sent."""

    def __init__(self, app, line: EngineQueue):
        self.app, self.line = app, line

    async def __call__(self, scope, receive, send) -> None:
        with self.line.admit():
            await self.app(scope, receive, send)


class Count:
    """Counts requests by route and status; a stream that failed or was left counts as what happened to it."""

    def __init__(self, app, line: EngineQueue):
        self.app, self.requests = app, line.metrics.requests

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500  # unless the app gets as far as to say something else

        async def note(message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, note)
        finally:
            route = getattr(scope.get("route"), "path", "other")  # never the path asked for: a client could fill memory
            self.requests.labels(route, scope.get("outcome", status)).inc()


# --- errors ----------------------------------------------------------------------------------------------------------


async def show_error(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def show_http_error(request: Request, error: HTTPException) -> Response:
    """Starlette's own: no such path, no such method."""
    return await show_error(request, ApiError(error.status_code, error.detail, headers=dict(error.headers or {})))


async def show_bug(request: Request, error: Exception) -> Response:
    return await show_error(request, ApiError(500, "the server failed; this is a bug"))


# --- bodies and answers ----------------------------------------------------------------------------------------------


async def receive_body(request: Request, limits: Limits) -> bytes:
    """The body, if it is small enough (else 413) and comes soon enough (else 408)."""
    too_large = ApiError(413, f"the body has more than {limits.max_body_bytes} bytes; send a shorter prompt")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limits.max_body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for part in request.stream():
                body += part
                if len(body) > limits.max_body_bytes:
                    raise too_large
    except TimeoutError:
        message = f"the body did not come within {limits.body_timeout_s:g} s; send it at once"
        raise ApiError(408, message, headers={"connection": "close"}) from None
    except ClientDisconnect:
        raise ApiError(CLIENT_GONE, "the client left") from None
    return bytes(body)


async def unless_gone(request: Request, answer):
    """The answer, or no more work on it once the client has hung up."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(answer), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ApiError(CLIENT_GONE, "the client left")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Events(StreamingResponse):
    """A stream that begins with its first event, so that an error before it has a status of its own.

    Its source is closed at once when the client leaves, also before that: this stops the engine.
    """

    media_type = "text/event-stream"

    async def __call__(self, scope, receive, send) -> None:
        async with aclosing(self.body_iterator) as events:
            first = await unless_gone(Request(scope, receive), anext(events))
            self.body_iterator = _with_first(first, events)
            await super().__call__(scope, receive, send)


async def _with_first(first: str, others: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for other in others:
        yield other


# --- connections and server -------------------------------------------------------------------------------------------


class Connection(H11Protocol):
    """uvicorn's, with the two deadlines that it lacks: for a request to come whole, and for an answer to be taken."""

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._stuck = None
        self._owed = self._cut_later()

    def _cut_later(self):
        return self.loop.call_later(SILENCE_S, self.transport.abort)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._owed.cancel()

    def on_response_complete(self) -> None:
        self._owed.cancel()
        self._owed = self._cut_later()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self._cut_later()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()

    def connection_lost(self, exc) -> None:
        self._owed.cancel()
        if self._stuck is not None:
            self._stuck.cancel()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """uvicorn's, which ends answers that outlast the grace time with an error, and itself with exit code 0."""

    def handle_exit(self, sig, frame) -> None:
        self.force_exit = self.should_exit  # asked twice: do not wait
        self.should_exit = True

    async def shutdown(self, sockets=None) -> None:
        line: EngineQueue = self.config.app.state.line
        asyncio.get_running_loop().call_later(line.limits.grace_s, line.abandon)
        await super().shutdown(sockets)
