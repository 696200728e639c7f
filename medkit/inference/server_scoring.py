"""The log-probabilities of options, from llama.cpp's server, in as few requests as are needed.

Under a grammar of all options the server writes the one that is likeliest token by token. It tells the likeliest tokens
at each place, and these are without the grammar. So this one request gives the score of the option that is written, and
for every other one the sum up to the first token in which it differs: the rest can only lower it. Only an option that
could still matter is then asked for alone.
"""

import asyncio
import math
from collections.abc import Mapping, Sequence

import httpx

TOP = 20  # likeliest tokens that are told at a place
NEGLIGIBLE = 4.6  # nats below the best: an option that is at most a hundredth as likely is not asked for alone
MAX_KNOWN = 1000  # options whose tokens are remembered


async def score_options(
    client: httpx.AsyncClient, chat: Mapping, options: Sequence[str], scoring: str, known_ids: dict[str, list[int]]
) -> list[float]:
    """The score of each option as the answer to `chat`, in nats; see `modeling.option_scoring`.

    `scoring`: 'option_text' the sum over the option's tokens and the end token, 'option_text_norm' their mean. An
    option that is more than NEGLIGIBLE below the best, or after which the end token is not among the TOP likeliest,
    gets an upper bound of its score. `known_ids` remembers tokens from call to call. Raises httpx.HTTPError, and
    LookupError, TypeError or ValueError for an answer without log-probabilities.
    """

    async def post(path: str, **body) -> dict:
        return (await client.post(path, json=body)).raise_for_status().json()

    async def tokenize(text: str) -> list[int]:
        """Token ids of an option; for no text, of the end of an answer."""
        if text not in known_ids:
            if len(known_ids) >= MAX_KNOWN:
                known_ids.clear()
            content = text or (await client.get("/props")).raise_for_status().json()["eos_token"]
            answer = await post("/tokenize", content=content, parse_special=not text)
            known_ids[text] = answer["tokens"]
        return known_ids[text]

    async def write(allowed: Sequence[list[int]]) -> list[dict]:
        """What is told of each token that the model writes if it may write one of these and then end."""
        grammar = "root ::= " + " | ".join(" ".join(f"<[{token}]>" for token in token_ids) for token_ids in allowed)
        settings = {"temperature": 0, "logprobs": True, "top_logprobs": TOP, "grammar": grammar}
        settings |= {name: chat[name] for name in ("messages", "lora") if name in chat}
        settings |= {"max_tokens": max(map(len, allowed)) + 1}
        return (await post("/v1/chat/completions", **settings))["choices"][0]["logprobs"]["content"]

    option_ids = [await tokenize(option) for option in options]
    written = await write(option_ids)
    all_ids = [token_ids + await tokenize("") for token_ids in option_ids]  # llama.cpp may end by another token
    lengths = [len(token_ids) if scoring == "option_text_norm" else 1 for token_ids in all_ids]

    def read(token_ids: list[int], places: list[dict]) -> tuple[float, bool]:
        """The sum of log-probabilities, or a bound for it, and whether it is the sum."""
        total = 0.0
        for count, (token, place) in enumerate(zip(token_ids, places, strict=False), start=1):
            if place["id"] != token:
                tops = {top["id"]: top["logprob"] for top in place["top_logprobs"]}
                is_sum = token in tops and count == len(token_ids)
                return total + tops.get(token, min(tops.values())), is_sum
            total += place["logprob"]
        return total, True

    readings = [read(token_ids, written) for token_ids in all_ids]
    scores = [score / length for (score, _), length in zip(readings, lengths, strict=True)]
    sums = (score for score, (_, is_sum) in zip(scores, readings, strict=True) if is_sum)
    best = max(sums, default=-math.inf)  # none, where the end is not among the likeliest tokens: then all are asked for
    open_ones = [i for i, (_, is_sum) in enumerate(readings) if not is_sum and scores[i] > best - NEGLIGIBLE]
    alone = await asyncio.gather(*(write([option_ids[i]]) for i in open_ones))
    for i, places in zip(open_ones, alone, strict=True):
        scores[i] = read(all_ids[i], places)[0] / lengths[i]
    return scores
