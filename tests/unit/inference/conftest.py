"""A toy edge file, and llama.cpp's own server on it."""

import pytest

from medkit.inference.server_engine import llama_server
from medkit.quantization import gguf_export


@pytest.fixture(scope="module")
def edge_file(make_llama, tokenizer, tmp_path_factory):
    return gguf_export.export_gguf(make_llama(), tokenizer, tmp_path_factory.mktemp("edge") / "student.gguf", "F16")


@pytest.fixture(scope="module")
def upstream(edge_file):
    with llama_server(edge_file, slots=2, context_tokens=1024, threads=1) as address:
        yield address
