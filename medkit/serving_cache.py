"""The response cache in front of a served engine: the very same request gets the same answer again, at once.

Exact requests only (`response_cache` tells why no similar ones), whole answers only, in memory only. No network here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge

from medkit.response_cache import ResponseCache, cache_key
from medkit.serving_schema import Ask


@dataclass(frozen=True)
class Lookup:
    """What was looked for, and the answer's token ids if it was there."""

    key: str
    found: list[int] | None
    cache: ResponseCache

    @property
    def headers(self) -> dict[str, str]:
        return {"x-medkit-cache": "miss" if self.found is None else "hit"}

    async def replay(self) -> AsyncIterator[int]:
        """The tokens of a hit, as an engine gives them."""
        for token in self.found:
            await asyncio.sleep(0)  # a long answer lets others have their turn, as one that is being written does
            yield token

    def keep(self, token_ids: Sequence[int]) -> None:
        """Keep what a miss was answered with. It must be whole: not cut off by an error or by a client that left."""
        if self.found is None:
            self.cache.put(self.key, token_ids)


class AnswerCache:
    """At most `answers` answers of one engine, the least recently used goes first; counted in `registry`."""

    def __init__(self, answers: int, model: str, registry: CollectorRegistry):
        self._cache, self._model = ResponseCache(answers), model
        self._lookups = Counter("medkit_cache_lookups", "Requests looked up", ["result"], registry=registry)
        Gauge("medkit_cache_answers", "Answers kept", registry=registry).set_function(lambda: len(self._cache))

    def look_up(self, ask: Ask) -> Lookup:
        """By all that decides which tokens are written; how they are sent (chat, stream, usage) does not."""
        request = ask.request
        settings = {"length": request.max_new_tokens, "ends": sorted(request.end_ids), "stops": sorted(ask.stops)}
        key = cache_key(request.prompt_ids, self._model, settings)
        found = self._cache.get(key)
        self._lookups.labels("miss" if found is None else "hit").inc()
        return Lookup(key, found, self._cache)
