"""The models of a run: loaded, or the edge file behind a server."""

import os
from contextlib import AbstractContextManager, closing

from torch import nn

from medkit.inference.server_engine import ServerEngine, llama_engine
from medkit.inference.torch_engine import TorchEngine
from medkit.lora import adapters
from medkit.modeling import loading
from medkit.modeling.engine import EngineError
from medkit.params import Params, ServerParams
from medkit.quantization import quantize
from medkit.stage import run_dir
from medkit.variants import ADAPTER, VARIANTS


def load_variant(run: str, folder: str, params: Params) -> nn.Module:
    """The model in a folder below the run's folder: saved whole, by a plan, or as a GGUF file.

    `folder` empty is the teacher as it was downloaded. The adapter beside the edge file is merged into that file's
    decoded weights, which gives what llama.cpp computes.
    """
    if not folder:
        teacher = params.models.teacher
        return loading.load_model(loading.local_folder(teacher), params.models, keep=teacher.keep_layers)
    path = run_dir(run) / folder
    if path.name == ADAPTER:
        edge = loading.load_model(run_dir(run) / VARIANTS["edge"].folder, params.models)
        return adapters.load_merged(edge, run_dir(run) / "03_lora" / "adapter")
    load = quantize.load_quantized if (path / quantize.PLAN).is_file() else loading.load_model
    return load(path, params.models)


def edge_engine(run: str, edge_file: str, server: ServerParams | None) -> AbstractContextManager[ServerEngine]:
    """An engine on the run's edge file: on `server`, or (None) on llama.cpp's own server, which ends with the block.

    llama.cpp keeps nothing of an earlier prompt, so that each time to first token is of a whole prompt. Raises
    EngineError if the server cannot be reached or its key is not in the environment.
    """
    if server:
        return closing(_connect(server, "inference.server"))
    return llama_engine(run_dir(run) / edge_file, options={"cache_prompt": False})


def make_engine(model: nn.Module | ServerParams, pad_token_id: int, **settings) -> TorchEngine | ServerEngine:
    """An engine over a loaded model, with `TorchEngine`'s settings, or on a server, with its temperature alone."""
    if isinstance(model, ServerParams):
        return _connect(model, "distillation.rationales.server", settings.get("temperature", 0.0))
    return TorchEngine(model, pad_token_id, **settings)


def read_key(server: ServerParams, key: str) -> str | None:
    """The server's API key. Raises EngineError, which names the params by `key`, if it is not in the environment."""
    api_key = os.environ.get(server.api_key_env, "").strip() if server.api_key_env else None
    if server.api_key_env and not api_key:
        raise EngineError(f"{key}: the API key is read from {server.api_key_env}, which is not set; export it")
    return api_key


def _connect(server: ServerParams, key: str, temperature: float = 0.0) -> ServerEngine:
    return ServerEngine(server.base_url, server.model, read_key(server, key), temperature=temperature)
