import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import GRID, SCHEDULE, MemorySource

from kdhiera.errors import UsageError
from kdhiera.masking import MaskSpec, Scope, Strategy, draw_mask
from kdhiera.training.batches import (
    Batch,
    Prefetcher,
    batches,
    epoch_order,
    make_batch,
    position_of,
)

SPEC = MaskSpec(strategy=Strategy.ATTENTION, scope=Scope.SLOT, ratio=0.5, seed=0)


def position(view: int = 1, draw: int = 1):
    return replace(
        position_of(0, steps_per_epoch=1, num_views=1, num_draws=1), view=view, draw=draw
    )


def some_batches(source: MemorySource, first_step: int = 0, num_steps: int = 12) -> Iterator[Batch]:
    return batches(
        source, SCHEDULE, first_step=first_step, num_steps=num_steps, batch_size=4, num_views=2,
        seed=0,
    )  # fmt: skip


@given(
    seed=st.integers(-(2**70), 2**70),
    epoch=st.integers(0, 1000),
    num_samples=st.integers(1, 300),
    block=st.integers(1, 40),
    data=st.data(),
)
def test_order_is_a_permutation_without_the_last_partial_batch(
    seed: int, epoch: int, num_samples: int, block: int, data: st.DataObject
) -> None:
    batch_size = data.draw(st.integers(1, num_samples))
    order = epoch_order(seed, epoch, num_samples, batch_size, block=block)
    assert order.shape == (num_samples // batch_size, batch_size)
    assert len(np.unique(order)) == order.size
    assert order.min() >= 0
    assert order.max() < num_samples


def test_order_depends_on_seed_and_epoch_only() -> None:
    first = epoch_order(3, 5, 1000, 10)
    np.random.seed(1)  # noqa: NPY002 the global generator must play no part
    assert np.array_equal(epoch_order(3, 5, 1000, 10), first)
    assert not np.array_equal(epoch_order(3, 6, 1000, 10), first)
    assert not np.array_equal(epoch_order(4, 5, 1000, 10), first)
    assert np.array_equal(epoch_order(3, 5, 1000, 25).ravel(), first.ravel())


def test_order_is_the_same_on_every_machine() -> None:
    """From `epoch_order(0, 0, 10, 10)` and `(0, 0, 10, 10, block=4)`."""
    assert epoch_order(0, 0, 10, 10).tolist() == [[8, 7, 6, 3, 5, 4, 2, 1, 0, 9]]
    assert epoch_order(0, 0, 10, 10, block=4).tolist() == [[2, 7, 6, 9, 5, 4, 3, 1, 0, 8]]


def test_first_place_of_the_order_is_uniform() -> None:
    counts = np.zeros(8)
    for epoch in range(4000):
        counts[epoch_order(0, epoch, 8, 8)[0, 0]] += 1
    chi_square = ((counts - 500) ** 2 / 500).sum()
    assert chi_square < 24.3  # 0.1 % point of 7 degrees of freedom


def runs_of(batch: np.ndarray) -> int:
    """Runs of eight neighbours that hold the batch, wherever they begin."""
    return min(len(np.unique((batch + offset) // 8)) for offset in range(8))


def test_a_batch_of_a_block_shuffle_touches_few_blocks() -> None:
    order = epoch_order(0, 1, 10_000, 100, block=8)
    touched = [runs_of(batch) for batch in order]
    assert max(touched) <= 2 * 16 + 1
    assert np.mean([runs_of(batch) for batch in epoch_order(0, 1, 10_000, 100)]) > 90


def test_a_batch_of_a_block_shuffle_mixes_blocks() -> None:
    order = epoch_order(0, 1, 10_000, 100, block=128)
    assert min(len(np.unique(batch // 128)) for batch in order) >= 12


def test_too_few_samples_for_a_batch_are_refused() -> None:
    with pytest.raises(UsageError, match=r"train.batch_size is 8, but only 7 clips"):
        epoch_order(0, 0, 7, 8)


def test_every_pair_of_view_and_draw_is_visited() -> None:
    seen = [position_of(step, steps_per_epoch=5, num_views=2, num_draws=3) for step in range(60)]
    assert [p.epoch for p in seen] == [step // 5 for step in range(60)]
    assert [(p.view, p.draw) for p in seen[::5]] == [
        (0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (0, 0), (1, 0), (0, 1), (1, 1), (0, 2),
        (1, 2),
    ]  # fmt: skip


def test_a_batch_holds_what_its_masks_show(source: MemorySource) -> None:
    samples = np.array([7, 0, 11])
    rows = source.read(samples, view=1)
    batch = make_batch(rows, SPEC, position(view=1, draw=1), samples)
    for row, sample in enumerate(samples):
        uid = f"clip-{sample}"
        shown = draw_mask(SPEC, source.scores[1, sample], uid=uid, view=1, draw=1)
        assert batch.units[row].tolist() == shown.tolist()
        at = [rows.units[row].tolist().index(unit) for unit in shown]
        cubes = GRID.frames_to_units(source.clips[1, sample][None])[0]
        assert np.array_equal(batch.pixels[row].numpy(), cubes[shown])
        assert np.array_equal(batch.pixels[row].numpy(), rows.pixels[row][at])
        features = source.features[1, sample][shown]
        assert np.array_equal(batch.columns["image-9"]["codes"][row].numpy(), features)
        assert np.array_equal(
            batch.columns["video-3"]["codes"][row].numpy(), 2 * features[..., :16]
        )
    assert batch.samples.tolist() == samples.tolist()


def test_a_batch_that_predicts_what_is_hidden(source: MemorySource) -> None:
    """Of clips that keep every unit: pixels of the visible ones, features of all others."""
    samples = np.array([3, 4])
    features = source.features[0, samples]
    rows = MemorySource(keep_all=True).read(samples, view=0)
    batch = make_batch(rows, SPEC, position(view=0), samples, predict_hidden=True)
    visible = make_batch(rows, SPEC, position(view=0), samples)
    assert torch.equal(batch.units, visible.units)
    assert torch.equal(batch.pixels, visible.pixels)
    for row in range(2):
        shown, hidden = set(batch.units[row].tolist()), batch.target_units[row].tolist()
        assert hidden == sorted(set(range(GRID.num_units)) - shown)
        stored = batch.columns["image-9"]["codes"][row].numpy()
        assert np.array_equal(stored, features[row, hidden])
    unseen = np.ones(rows.pixels.shape[:2], bool)
    np.put_along_axis(unseen, batch.units.numpy(), False, axis=1)
    noise = np.random.default_rng(1).integers(0, 256, rows.pixels.shape, dtype=np.uint8)
    mixed = np.where(unseen[:, :, None, None, None, None], noise, rows.pixels)
    noisy = make_batch(
        replace(rows, pixels=mixed), SPEC, position(view=0), samples, predict_hidden=True
    )
    assert torch.equal(noisy.pixels, batch.pixels)  # what hidden pixels hold is never seen
    assert visible.target_units is visible.units
    moved = visible.map(torch.clone)
    assert moved.target_units is moved.units
    assert torch.equal(batch.map(torch.clone).target_units, batch.target_units)
    kept = source.read(samples, view=0)
    with pytest.raises(LookupError, match="a unit that this mask hides"):
        make_batch(kept, SPEC, position(view=0), samples, predict_hidden=True)


def test_ratios_follow_one_another_in_equal_shares_of_the_steps(source: MemorySource) -> None:
    """What a later phase shows is a part of what the first would have shown."""
    phases = tuple(replace(SPEC, ratio=ratio) for ratio in (0.5, 0.75, 0.8))
    masks = replace(SCHEDULE, phases=phases)
    assert masks.widest is phases[0]
    assert [masks.at(step, 8).ratio for step in range(8)] == [0.5] * 3 + [0.75] * 3 + [0.8] * 2
    assert [masks.at(step, 2).ratio for step in range(2)] == [0.5, 0.75]
    common = {"first_step": 0, "num_steps": 9, "batch_size": 4, "num_views": 2, "seed": 0}
    scheduled = list(batches(source, masks, **common))
    plain = list(batches(source, SCHEDULE, **common))
    assert [batch.units.shape[1] for batch in scheduled] == [4] * 3 + [2] * 6
    for one, other in zip(scheduled, plain, strict=True):
        assert torch.equal(one.samples, other.samples)
        for row, all_shown in zip(one.units.tolist(), other.units.tolist(), strict=True):
            assert set(row) <= set(all_shown)


def test_a_mask_the_cache_does_not_cover_is_an_error(source: MemorySource) -> None:
    samples = np.arange(18)
    wider = replace(SPEC, strategy=Strategy.RANDOM)
    with pytest.raises(LookupError, match=r"clip clip-\d+, view 0: the cache does not keep"):
        make_batch(source.read(samples, view=0), wider, position(view=0, draw=1), samples)


def test_batches_from_the_middle_are_the_same_batches(source: MemorySource) -> None:
    whole = list(some_batches(source))
    rest = list(some_batches(source, first_step=7))
    assert [b.position.step for b in rest] == [7, 8, 9, 10, 11]
    for a, b in zip(whole[7:], rest, strict=True):
        assert torch.equal(a.units, b.units)
        assert torch.equal(a.pixels, b.pixels)
        assert a.position == b.position


def test_prefetching_changes_nothing(source: MemorySource) -> None:
    wanted = list(some_batches(source))
    with Prefetcher(some_batches(source), depth=2) as ready:
        found = list(ready)
    assert [b.position for b in found] == [b.position for b in wanted]
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(found, wanted, strict=True))


def test_prefetching_reads_no_further_ahead_than_its_depth(source: MemorySource) -> None:
    taken = []

    def counted() -> Iterator[Batch]:
        for batch in some_batches(source):
            taken.append(batch.position.step)
            yield batch

    with Prefetcher(counted(), depth=2) as ready:
        assert next(iter(ready)).position.step == 0
        deadline = time.monotonic() + 5
        while len(taken) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(taken) == 4  # one handed out, two waiting, one in the thread's hands


def test_an_error_while_reading_reaches_the_reader(source: MemorySource) -> None:
    def failing() -> Iterator[Batch]:
        yield next(some_batches(source))
        raise OSError("the disk went away")

    with Prefetcher(failing(), depth=2) as ready, pytest.raises(OSError, match="went away"):
        list(ready)


def test_leaving_early_ends_the_thread(source: MemorySource) -> None:
    before = threading.active_count()
    with Prefetcher(some_batches(source), depth=1) as ready:
        next(iter(ready))
    assert threading.active_count() == before
