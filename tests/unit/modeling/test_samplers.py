"""Every row of a batch goes to one process, and no process has much more to do than another."""

from itertools import chain

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
    batches, orders = EpochBatches(29, 4, seed=0), []
    for epoch in (0, 1, 2, 1):
        batches.set_epoch(epoch)
        orders.append(list(batches))
    assert orders[1] == orders[3] and len({str(order) for order in orders}) == 3


def test_a_batch_has_rows_of_both_tasks_and_seldom_two_copies_of_one():
    """Rows of two tasks of 24 different rows each; rows 0, 48, 96 and 144 are copies."""
    batches = list(EpochBatches(192, 4, seed=0))
    assert sorted(chain.from_iterable(batches)) == list(range(192))
    assert sum(len({row % 2 for row in batch}) == 2 for batch in batches) >= 38
    assert sum(len({row % 48 for row in batch}) == 4 for batch in batches) >= 40
