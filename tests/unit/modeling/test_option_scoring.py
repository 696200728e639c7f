"""One reading serves many: equal beginnings of prompts and options change the work and no score."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toys import plain_score

from medkit.modeling import batches, option_scoring
from medkit.modeling.option_scoring import Item

HEADERS = [[], [7, 8, 9], [7, 8, 9, 10, 11, 12, 13], [7, 8, 20, 21, 22]]  # two begin like another one
token = st.integers(3, 30)  # few, so that answers often begin alike
items = st.builds(
    lambda header, own, answers: Item([*header, *own], answers),
    st.sampled_from(HEADERS),
    st.lists(token, min_size=1, max_size=6),
    st.lists(st.lists(token, min_size=1, max_size=5), min_size=1, max_size=4),
)


@pytest.fixture(scope="module")
def toys(make_llama):
    return {kind: make_llama(layers=2, kind=kind, initializer_range=0.2) for kind in ("Llama", "Qwen2")}


def plain_scores(model, item):
    return [plain_score(model, item.prompt_ids, answer) for answer in item.answer_ids]


@pytest.fixture
def fed(toys, monkeypatch):
    """The shapes (rows, tokens) of every pass of the Llama."""
    shapes, forward = [], toys["Llama"].forward
    note = lambda **given: shapes.append(given["input_ids"].shape) or forward(**given)  # noqa: E731
    monkeypatch.setattr(toys["Llama"], "forward", note)
    return shapes


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=st.lists(items, min_size=1, max_size=8), most_tokens=st.integers(1, 80))
def test_scores_are_those_of_each_option_alone_whatever_is_shared(toys, architecture, asked, most_tokens, monkeypatch):
    model = toys[architecture]
    monkeypatch.setattr(batches, "PACKED_TOKENS", most_tokens)
    found = option_scoring.score_options(model, asked)
    for item, scores in zip(asked, found, strict=True):
        assert scores == pytest.approx(plain_scores(model, item), abs=1e-4)
    backwards = option_scoring.score_options(model, asked[::-1])[::-1]
    for there, back in zip(found, backwards, strict=True):
        assert back == pytest.approx(there, abs=1e-4)


def test_a_shared_prefix_is_read_once(toys, fed):
    asked = [Item([*range(3, 13), 20 + i], [[7], [9]]) for i in range(6)]
    option_scoring.score_options(toys["Llama"], asked)
    assert fed == [(1, 10 + 6)]


def test_equal_beginnings_of_options_are_read_once_and_last_tokens_never(toys, fed):
    item = Item([5, 6], [[10, 11, 12], [10, 11, 13, 14], [10, 15], [16], [10, 11, 12]])
    (scores,) = option_scoring.score_options(toys["Llama"], [item])
    assert fed == [(1, len([5, 6, 10, 11, 13]))]
    assert scores[0] == scores[4]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_sliding_window_slides_along_the_branch(make_llama, attention):
    """Gemma 3: every other layer sees the last few tokens only, of the prefix too."""
    window = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}
    model = make_llama(layers=2, kind="Gemma3", initializer_range=0.2, attn_implementation=attention, **window)
    asked = [Item([*range(3, 3 + n), 20 + n], [[7, 8, 9, 4], [7, 8, 5], [9]]) for n in (12, 12, 15, 9)]
    for item, scores in zip(asked, option_scoring.score_options(model, asked), strict=True):
        assert scores == pytest.approx(plain_scores(model, item), abs=1e-4)
