"""Every row once, and the same batches for any number of processes."""

from itertools import chain

from hypothesis import given, settings
from hypothesis import strategies as st

from medkit.modeling.samplers import EpochBatches, EpochLoader, share

lengths = st.lists(st.integers(1, 90), min_size=1, max_size=40)


@given(lengths, st.integers(1, 5))
def test_a_batch_is_shared_out_whole_and_evenly(lengths, processes):
    shares = share(range(len(lengths)), lengths, processes)
    assert len(shares) == processes
    assert sorted(chain.from_iterable(shares)) == list(range(len(lengths)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    work = [sum(lengths[row] for row in rows) for rows in shares]
    assert max(work) - min(work) <= max(lengths), "dealt out by length, no process has a row more work than another"


@settings(max_examples=25)
@given(st.lists(st.integers(1, 90), min_size=2, max_size=60), st.integers(1, 9), st.booleans())
def test_epochs_hold_every_row_once_and_differ_only_by_their_number(lengths, size, curriculum):
    difficulty = [-length for length in lengths] if curriculum else None

    def epoch(number):
        loader = EpochLoader(EpochBatches(lengths, size, seed=3, difficulty=difficulty), list)
        loader.set_epoch(number)
        return list(loader)

    for number in (0, 1, 2):
        batches = epoch(number)
        assert sorted(chain.from_iterable(batches)) == list(range(len(lengths)))
        assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
        assert epoch(number) == batches


def test_a_loader_that_skips_to_a_checkpoint_still_hears_the_epoch():
    """As the Trainer does it: it cuts off the first batches, then tells the batch sampler below the cut."""
    from accelerate import skip_first_batches

    lengths = list(range(1, 30))

    def loader():
        return EpochLoader(EpochBatches(lengths, 4, seed=0), list)

    whole = loader()
    whole.set_epoch(5)
    rest = skip_first_batches(loader(), 3)
    rest.batch_sampler.batch_sampler.set_epoch(5)
    assert list(rest) == list(whole)[3:]
    assert list(whole)[3:] != list(loader())[3:]
