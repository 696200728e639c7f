"""Every row of a batch goes to one process, and no process has much more to do than another."""

from itertools import chain, pairwise

from hypothesis import given
from hypothesis import strategies as st

from medkit.modeling.samplers import EpochBatches, share

lengths = st.lists(st.integers(1, 90), min_size=1, max_size=40)


@given(lengths, st.integers(1, 5))
def test_a_batch_is_shared_out_whole_and_evenly(lengths, processes):
    shares = share(range(len(lengths)), lengths, processes)
    assert len(shares) == processes
    assert sorted(chain.from_iterable(shares)) == list(range(len(lengths)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    work = [sum(lengths[row] for row in rows) for rows in shares]
    assert max(work) - min(work) <= max(lengths), "dealt out by length, no process has a row more work than another"


def test_each_epoch_has_an_order_of_its_own():
    batches, orders = EpochBatches(range(1, 30), 4, seed=0), []
    for epoch in (0, 1, 2, 1):
        batches.set_epoch(epoch)
        orders.append(list(batches))
    assert orders[1] == orders[3] and len({str(order) for order in orders}) == 3


def test_batches_of_long_rows_do_not_come_in_a_block():
    """Rows of two tasks, one of which has longer rows."""
    batches = list(EpochBatches([250] * 96 + [50] * 96, 4, seed=0))
    kinds = [{row < 96 for row in batch} for batch in batches]
    assert sum(len(kind) == 1 for kind in kinds) >= 40, "nearly every batch has rows of similar length"
    assert sum(one != other for one, other in pairwise(kinds)) >= 16
    assert sorted(chain.from_iterable(batches)) == list(range(192))
