"""Batches: which samples, under which masks, and ready before they are asked for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, Int64, UInt8, UInt64
from torch import Tensor

from kdhiera.cache.rows import KeptRows
from kdhiera.errors import UsageError
from kdhiera.masking import MaskSchedule, MaskSpec, draw_mask, hidden_units
from kdhiera.views import stable_key

WINDOW_BLOCKS = 16  # runs of neighbours that are shuffled together
_LAST = np.uint64(2**64 - 1)


@runtime_checkable
class ClipSource(Protocol):
    """Where kept units come from: the cache, or teachers running live."""

    @property
    def num_samples(self) -> int:
        """Clips that can be trained on."""
        ...

    def read(self, samples: Int[np.ndarray, " b"], *, view: int) -> KeptRows:
        """Kept units of these samples in one view, in the order asked for.

        Args:
            samples: Sample numbers, 0 .. num_samples - 1.
            view: View number.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where in a run a step stands; a pure function of the step number.

    Args:
        step: Optimiser steps done before this one.
        epoch: `step // steps_per_epoch`.
        view: `epoch mod V`.
        draw: `(epoch // V) mod D`.
    """

    step: int
    epoch: int
    view: int
    draw: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The visible units of `b` clips, and the cached features of the units to predict.

    Args:
        position: Step, epoch, view and draw.
        samples: Sample numbers.
        units: Visible unit numbers, ascending in every row.
        pixels: RGB of the visible units.
        target_units: Numbers of the units to predict, ascending in every row: `units`, or
            all others.
        columns: Their encoded features by column id and array name, axes `b m ...`.
        place: Clips of the step's batch before these, where they are a slice of it.
    """

    position: Position
    samples: Int64[Tensor, " b"]
    units: Int64[Tensor, "b k"]
    pixels: UInt8[Tensor, "b k 2 32 32 3"]
    target_units: Int64[Tensor, "b m"]
    columns: Mapping[str, Mapping[str, Tensor]]
    place: int = 0

    def parts(self, count: int) -> list[Batch]:
        """The batch in equal slices, in order.

        Args:
            count: How many; divides the number of clips.
        """
        size = len(self.samples) // count
        return [
            replace(self.map(lambda t, s=start: t[s : s + size]), place=self.place + start)  # type: ignore[misc]
            for start in range(0, count * size, size)
        ]

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with a function applied to every tensor."""
        units = function(self.units)
        same = self.target_units is self.units
        return replace(
            self,
            samples=function(self.samples),
            units=units,
            pixels=function(self.pixels),
            target_units=units if same else function(self.target_units),
            columns={
                column: {name: function(array) for name, array in arrays.items()}
                for column, arrays in self.columns.items()
            },
        )


def position_of(step: int, *, steps_per_epoch: int, num_views: int, num_draws: int) -> Position:
    """Epoch, view and draw of a step: every (view, draw) pair is visited in turn."""
    epoch = step // steps_per_epoch
    return Position(
        step=step, epoch=epoch, view=epoch % num_views, draw=epoch // num_views % num_draws
    )


def epoch_order(
    seed: int, epoch: int, num_samples: int, batch_size: int, *, block: int = 1
) -> Int64[np.ndarray, "steps b"]:
    """Sample numbers of every step of an epoch.

    A pure function of its arguments, made of raw Philox words, so that no NumPy version,
    platform or worker count changes it. With a block size the samples are cut into runs
    of `block` neighbours (from a random offset, round the end), the runs are shuffled,
    then the samples of every 16 runs in a row: a batch mixes 16 places of the storage and
    touches no more (twice that where it straddles two windows).

    Args:
        seed: Any integer.
        epoch: Epoch number.
        num_samples: Samples of the run.
        batch_size: Samples of a step.
        block: Neighbours kept together; 1 shuffles fully.

    Returns:
        One row a step; the samples of the last partial batch are left out.

    Raises:
        UsageError: If there are fewer samples than a batch needs.
    """
    if num_samples < batch_size:
        raise UsageError(
            f"train.batch_size is {batch_size}, but only {num_samples} clips can be trained on: "
            "lower it, or extract more clips"
        )
    noise = np.random.Philox(key=stable_key("order", seed, epoch))
    if block == 1:
        order = _shuffled(num_samples, noise)
    else:
        offset = int(noise.random_raw()) % num_samples
        order = _shuffled_by_blocks(num_samples, block, noise)
        order += offset
        np.subtract(order, num_samples, out=order, where=order >= num_samples)
    steps = num_samples // batch_size
    return order[: steps * batch_size].reshape(steps, batch_size)


def _shuffled(count: int, noise: np.random.Philox) -> Int64[np.ndarray, " n"]:
    """The numbers 0 .. count-1 in random order.

    Sorts words `random bits | number`, which are all distinct, so that every sorting
    algorithm gives the same order.
    """
    keys = _keys(count, noise, num_groups=1)
    keys.sort()
    return _numbers(keys, count)


def _shuffled_by_blocks(count: int, block: int, noise: np.random.Philox) -> Int64[np.ndarray, " n"]:
    """Runs of `block` numbers in random order, then the numbers of every 16 runs in a row.

    The words of a window lie together and are sorted by themselves, in the processor's
    cache; the last run and the last window may be short, and what fills them up sorts last.
    """
    num_blocks = -(-count // block)
    blocks = _shuffled(num_blocks, noise)
    num_windows = -(-num_blocks // WINDOW_BLOCKS)
    filled = np.full((num_blocks, block), _LAST)
    filled.reshape(-1)[:count] = _keys(count, noise, num_groups=num_windows)
    windows = np.full((num_windows * WINDOW_BLOCKS, block), _LAST)
    np.take(filled, blocks, axis=0, out=windows[:num_blocks], mode="clip")
    del filled
    windows = windows.reshape(num_windows, WINDOW_BLOCKS * block)
    windows.sort(axis=1)
    return _numbers(windows[windows != _LAST], count)


def _keys(count: int, noise: np.random.Philox, *, num_groups: int) -> UInt64[np.ndarray, " n"]:
    """Words of random bits that end in their own number.

    As many bits on top stay zero as groups of numbers that are sorted apart would need to
    be told from one another.
    """
    low = (count - 1).bit_length()
    high = 64 - max(1, (num_groups - 1).bit_length())
    keys = noise.random_raw(count)
    keys &= np.uint64((1 << high) - (1 << low))
    keys |= np.arange(count, dtype=np.uint64)
    return keys


def _numbers(keys: UInt64[np.ndarray, " n"], count: int) -> Int64[np.ndarray, " n"]:
    """The numbers that words of `_keys` end in."""
    keys &= np.uint64((1 << (count - 1).bit_length()) - 1)
    return keys.view(np.int64)


def make_batch(
    rows: KeptRows,
    spec: MaskSpec,
    position: Position,
    samples: Int[np.ndarray, " b"],
    *,
    predict_hidden: bool = False,
) -> Batch:
    """Draw the masks of a batch and gather what they ask for from the kept units.

    Args:
        rows: Kept units of the batch's clips.
        spec: How masks are drawn.
        position: View and draw of the batch.
        samples: Sample numbers of the rows.
        predict_hidden: Predict the units that masks hide instead of those that they show.

    Raises:
        LookupError: If a mask asks for a unit that was not kept.
    """
    visible = np.stack(
        [
            draw_mask(spec, scores, uid=uid, view=position.view, draw=position.draw)
            for uid, scores in zip(rows.uids, rows.scores, strict=True)
        ]
    )
    b, bound = rows.units.shape
    num_units = int(np.prod(rows.scores.shape[1:]))
    where = np.full((b, num_units + 1), -1)  # the last place takes the padding
    np.put_along_axis(where, rows.units.astype(np.int64) % (num_units + 1), np.arange(bound), 1)

    def places(units: Int[np.ndarray, "b k"], verb: str) -> Int[np.ndarray, "b k"]:
        found = np.take_along_axis(where, units, axis=1)
        if found.min() < 0:
            row = int(np.argmin(found.min(1)))
            raise LookupError(
                f"clip {rows.uids[row]}, view {position.view}: the cache does not keep a unit that "
                f"this mask {verb} (strategy {spec.strategy}, ratio {spec.ratio:g}, draw "
                f"{position.draw})"
            )
        return np.asarray(found + np.arange(b)[:, None] * bound)

    def gather(array: np.ndarray, flat: Int[np.ndarray, "b k"]) -> Tensor:
        return torch.from_numpy(array.reshape(b * bound, *array.shape[2:])[flat])

    shown = places(visible, "shows")
    units = target_units = torch.from_numpy(visible.astype(np.int64))
    wanted = shown
    if predict_hidden:
        hidden = hidden_units(visible, num_units)
        wanted, target_units = places(hidden, "hides"), torch.from_numpy(hidden)
    return Batch(
        position=position,
        samples=torch.from_numpy(np.asarray(samples, dtype=np.int64)),
        units=units,
        pixels=gather(rows.pixels, shown),
        target_units=target_units,
        columns={
            column: {name: gather(array, wanted) for name, array in arrays.items()}
            for column, arrays in rows.columns.items()
        },
    )


def batches(
    source: ClipSource,
    masks: MaskSchedule,
    *,
    first_step: int,
    num_steps: int,
    batch_size: int,
    num_views: int,
    seed: int,
    block: int = 1,
    rank: int = 0,
    num_ranks: int = 1,
) -> Iterator[Batch]:
    """A rank's slices of the batches of the steps `first_step` .. `num_steps - 1`, in order.

    Only the slice is read.

    Args:
        source: Where kept units are read.
        masks: How masks are drawn, and what is predicted.
        first_step: Steps done before.
        num_steps: Steps of the whole run.
        batch_size: Clips of a step, all ranks together.
        num_views: Views that epochs go round.
        seed: Decides the order.
        block: See `epoch_order`.
        rank: Whose slices.
        num_ranks: Equal slices of a batch; divides `batch_size`.
    """
    size = batch_size // num_ranks
    place = rank * size
    steps_per_epoch = max(1, source.num_samples // batch_size)
    order, order_epoch = np.empty((0, 0), dtype=np.int64), -1
    for step in range(first_step, num_steps):
        position = position_of(
            step, steps_per_epoch=steps_per_epoch, num_views=num_views, num_draws=masks.draws
        )
        if position.epoch != order_epoch:
            order_epoch = position.epoch
            order = epoch_order(seed, order_epoch, source.num_samples, batch_size, block=block)
        samples = order[step % steps_per_epoch][place : place + size]
        rows = source.read(samples, view=position.view)
        spec, hidden = masks.at(step, num_steps), masks.predicts_hidden
        batch = make_batch(rows, spec, position, samples, predict_hidden=hidden)
        yield replace(batch, place=place)


class Prefetcher:
    """Reads batches ahead in a thread; iterate over it within `with`.

    An exception of the reading thread is raised to whoever asks for the next batch.

    Args:
        source: What to read; consumed by the thread.
        depth: Batches held ready.
        pin_memory: Put them into pinned memory, for copies to a CUDA device.
    """

    def __init__(self, source: Iterator[Batch], *, depth: int, pin_memory: bool = False) -> None:
        self._source = source
        self._pin_memory = pin_memory
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kdhiera-prefetch", daemon=True)

    def __enter__(self) -> Prefetcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        while self._thread.is_alive():  # it may wait for room
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            item = self._queue.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def _run(self) -> None:
        try:
            for batch in self._source:
                ready = batch.map(Tensor.pin_memory) if self._pin_memory else batch
                self._queue.put(ready)
                if self._closed.is_set():
                    return
            self._queue.put(None)
        except BaseException as error:  # handed to the asking thread, whatever it is
            self._queue.put(error)
