"""The models of a run by name, as notebook 04 lists them: loaded, or put into the engines that suit them.

What a variant is and how it came about is for the notebooks that make it; how fast an engine is, for `workloads`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import pandas as pd
from torch import nn
from transformers import AutoConfig

from medkit.inference.edge_engine import LlamaCppEngine, OpenVinoEngine, import_openvino
from medkit.inference.torch_engine import TorchEngine
from medkit.modeling import loading
from medkit.modeling.engine import Engine, EngineError
from medkit.params import Params, ServerParams
from medkit.quantization import quantize
from medkit.stage import Stage, StageError, run_dir

SERVED_STEP_TOKENS = 64  # one step of the edge engine holds up the whole process: short ones keep a server awake

log = logging.getLogger(__name__)


def place_of(run: str, variant: str) -> str:
    """Where a variant lies in its run's folder; empty for the teacher as it came. Raises StageError."""
    listed = Stage(run, "05_inference").require("04_quantization", "variants.parquet")
    places = pd.read_parquet(listed).set_index("variant").place
    if variant not in places:
        raise StageError(f"run {run!r} has no model {variant!r}; it has {', '.join(places.index)}")
    return places[variant]


def load_variant(run: str, place: str, params: Params) -> nn.Module:
    """The model at a place, saved whole, by a plan or as a GGUF file; the teacher as it came where it is empty."""
    if not place:
        teacher = params.models.teacher
        return loading.load_model(loading.local_folder(teacher), params.models, keep=teacher.keep_layers)
    folder = run_dir(run) / place
    load = quantize.load_quantized if (folder / quantize.PLAN).is_file() else loading.load_model
    return load(folder, params.models)


def load_engine(run: str, variant: str, params: Params) -> tuple[Engine, object, int]:
    """Engine, tokenizer and context length (tokens) that serve a variant; the edge file by OpenVINO where it is.

    `auto`'s choice is for one request at a time and not asked here: a server has many, and llama.cpp, which may have
    won, writes one answer after the other.
    """
    place = place_of(run, variant)
    folder = Stage(run, "05_inference").require("03_lora", "merged")
    if place in ("", "02_distillation/teacher"):  # which may have a tokenizer of its own
        folder = loading.local_folder(params.models.teacher)
    context = AutoConfig.from_pretrained(folder).get_text_config().max_position_embeddings
    tokenizer = loading.load_tokenizer(folder)
    if place.endswith(".gguf"):
        try:
            import_openvino()
            edge = OpenVinoEngine(run_dir(run) / place, batch_tokens=SERVED_STEP_TOKENS, cache_tokens=context)
            return edge, tokenizer, context
        except EngineError as error:
            log.warning("transformers reads %s, more slowly: %s", place, error)
    model = load_variant(run, place, params)
    return TorchEngine(model, tokenizer.pad_token_id, batch_tokens=params.inference.batch_tokens), tokenizer, context


def in_torch(run: str, place: str, params: Params, pad_token_id: int) -> TorchEngine:
    """The model at a place in the transformers engine, which writes one request after the other."""
    model = load_variant(run, place, params)
    return TorchEngine(model, pad_token_id, scheduler="sequential", batch_tokens=params.inference.batch_tokens)


def edge_candidates(run: str, place: str, params: Params, tokenizer) -> dict[str, Callable[[], Engine]]:
    """Who may answer for the edge file at a place, for `engine_choice`; each is loaded when it is called.

    transformers is the reference. A server that the params name is one more; what it really serves is its own affair,
    so its agreement with the reference matters.
    """
    file, server = run_dir(run) / place, params.inference.server
    found = {
        "transformers": lambda: in_torch(run, place, params, tokenizer.pad_token_id),
        "openvino": lambda: OpenVinoEngine(file, exact=False),
        "llama.cpp": lambda: LlamaCppEngine(file),
    }
    return found | ({"remote": lambda: reach(server, tokenizer)} if server else {})


def reach(server: ServerParams, tokenizer) -> Engine:
    """An engine on that server, its key from the environment. Raises EngineError, within seconds, if there is none."""
    try:
        from medkit.inference.server_engine import RemoteEngine
    except ImportError as error:
        raise EngineError(f"inference.server needs the extra `serve` ({error}): pip install -e '.[serve]'") from error
    key = os.environ.get(server.api_key_env) if server.api_key_env else None
    if server.api_key_env and not key:
        raise EngineError(f"inference.server: its key is read from {server.api_key_env}, which is not set; export it")
    try:
        return RemoteEngine(server.base_url, server.model, tokenizer, key)
    except EngineError as error:
        raise EngineError(f"inference.server: {error}") from error
