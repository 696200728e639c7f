"""What begins alike is read once: trees of sequences."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from medkit.modeling import prefix_tree

some_prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=12)


@given(some_prompts.filter(len), st.booleans())
def test_a_tree_holds_every_sequence_on_a_path_of_its_own(sequences, share):
    tree = prefix_tree.build_tree(sequences, share)
    sees = tree.mask()
    for sequence, path in zip(sequences, tree.paths, strict=True):
        assert [tree.token_ids[place] for place in path] == sequence
        assert [tree.depths[place] for place in path] == list(range(len(sequence)))
        for depth, place in enumerate(path):
            assert sees[place].nonzero()[:, 0].tolist() == sorted(path[: depth + 1])
    beginnings = {tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)}
    assert len(tree.token_ids) == (len(beginnings) if share else sum(map(len, sequences)))


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
