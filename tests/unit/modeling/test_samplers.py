"""Every row of a batch goes to one process, and no process has much more to do than another."""

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from medkit.modeling.samplers import share

lengths = st.lists(st.integers(1, 90), min_size=1, max_size=40)


@given(lengths, st.integers(1, 5))
def test_a_batch_is_shared_out_whole_and_evenly(lengths, processes):
    shares = share(range(len(lengths)), lengths, processes)
    assert len(shares) == processes
    assert sorted(chain.from_iterable(shares)) == list(range(len(lengths)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    work = [sum(lengths[row] for row in rows) for rows in shares]
    assert max(work) - min(work) <= max(lengths), "dealt out by length, no process has a row more work than another"
