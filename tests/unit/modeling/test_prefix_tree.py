"""What begins alike is read once: trees of sequences."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from medkit.modeling import batches, prefix_tree
from medkit.modeling.batches import Example

some_prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=12)


@given(some_prompts, st.integers(1, 20), st.booleans())
def test_groups_are_cut_to_fit_and_no_sequence_is_lost(sequences, most, share):
    groups = prefix_tree.cut_by_prefix(sequences, most, share)
    assert sorted(itertools.chain(*groups)) == list(range(len(sequences)))
    sizes = [len(prefix_tree.build_tree([sequences[i] for i in group], share).token_ids) for group in groups]
    assert all(len(group) == 1 or size <= most for group, size in zip(groups, sizes, strict=True))
    for group, (first, *_) in itertools.pairwise(groups):
        both = prefix_tree.build_tree([sequences[i] for i in (*group, first)], share)
        assert len(both.token_ids) > most, "what still fits goes along"


def test_flash_attention_takes_no_branches(make_llama):
    model = make_llama()
    assert prefix_tree.takes_branches(model)
    model.config._attn_implementation = "flash_attention_2"
    assert not prefix_tree.takes_branches(model)
    assert "attention_mask" not in batches.pack([Example([5, 6, 7], 1)] * 2, share=False)
