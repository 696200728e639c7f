"""llama.cpp's own server in a process of its own: `python llama_process.py`, started by `server_engine.llama_server`.

Reads its settings as one line of JSON, prints its address, and ends when its standard input is closed, so it also ends
when its parent dies. This file imports nothing of medkit: the process must stay small.
"""

import functools
import json
import sys


def main() -> None:
    import xllamacpp

    settings = json.loads(sys.stdin.readline())
    params = xllamacpp.CommonParams()
    params.model.path = settings["path"]
    params.model_alias = {"edge"}
    params.n_parallel = settings["slots"]
    params.n_ctx = settings["slots"] * settings["context_tokens"]  # each slot has an equal part of it
    # for earlier prompts: llama.cpp's own limit is 8 GB, too much for a laptop. It does not remember which prompt was
    # read with an adapter, so beside an adapter there is none.
    params.cache_ram_mib = 0 if settings["adapter"] else 256
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    params.api_keys = [settings["api_key"]]
    params.endpoint_metrics, params.endpoint_slots, params.ui = True, False, False
    if settings["adapter"]:  # off, unless a request asks for it
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(settings["adapter"], 0.0)]
    params.verbosity = 1  # errors only
    for name, value in settings["options"].items():
        *parents, last = name.split(".")
        setattr(functools.reduce(getattr, parents, params), last, value)
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
