"""One vector per text whatever its company, of length 1, pooled over its own tokens."""

import numpy as np
import pytest
import torch
from toys import save_encoder
from transformers import AutoModel, AutoTokenizer

from medkit.modeling import embeddings

TEXTS = ["heart attack", "a", "broken wrist in the left arm of a child", "heart attack", "fever", "pain " * 400, ""]


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    torch.set_num_threads(1)
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def embed(folder, texts):
    return embeddings.embed_texts(folder, texts, "cpu")


@pytest.mark.parametrize("batch_tokens", [1, 16, 4096])
def test_a_text_is_embedded_alike_alone_and_in_company(toy_folder, batch_tokens, monkeypatch):
    alone = np.vstack([embed(toy_folder, [text]) for text in TEXTS])
    monkeypatch.setattr(embeddings, "BATCH_TOKENS", batch_tokens)
    assert np.allclose(embed(toy_folder, TEXTS), alone, atol=1e-5)
    assert embed(toy_folder, []).shape == (0, 32)


def test_the_vector_is_the_mean_over_the_tokens(toy_folder):
    model, tokenizer = AutoModel.from_pretrained(toy_folder).eval(), AutoTokenizer.from_pretrained(toy_folder)
    ids = tokenizer("broken wrist", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        mean = model(input_ids=ids).last_hidden_state[0].mean(0).numpy()
    assert np.allclose(embed(toy_folder, ["broken wrist"])[0], mean / np.linalg.norm(mean), atol=1e-5)


def test_long_texts_are_cut(toy_folder):
    kept = embeddings.MAX_TOKENS - 2  # both ends are tokens too
    texts = ["0" * kept, "0" * kept + "1" * 50, "0" * (kept - 1) + "1"]  # a token for each digit
    vectors = embed(toy_folder, texts)
    assert np.allclose(vectors[0], vectors[1], atol=1e-6)
    assert not np.allclose(vectors[0], vectors[2], atol=1e-6)
