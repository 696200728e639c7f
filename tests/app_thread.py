"""An ASGI application behind a real socket, for tests of what speaks to it; one that answers as vLLM does."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route


@contextmanager
def running_app(app) -> Iterator[str]:
    """Its address, http://127.0.0.1:<port>, for the block."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@contextmanager
def running_completions(answer: Callable, owner: str = "vllm", model: str = "toy") -> Iterator[str]:
    """The URL, …/v1, of a server whose completions are what `answer(body)` returns: chunks to stream, or a response."""

    async def complete(request):
        found = answer(await request.json())
        if not isinstance(found, list):
            return found
        events = [f"data: {json.dumps({'choices': [{'index': 0} | chunk]})}\n\n" for chunk in found]
        return StreamingResponse(iter([*events, "data: [DONE]\n\n"]), media_type="text/event-stream")

    async def models(request):
        return JSONResponse({"object": "list", "data": [{"id": model, "object": "model", "owned_by": owner}]})

    routes = [Route("/v1/completions", complete, methods=["POST"]), Route("/v1/models", models)]
    with running_app(Starlette(routes=routes)) as url:
        yield f"{url}/v1"
