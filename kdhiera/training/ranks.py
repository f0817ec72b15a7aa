"""The processes that train one student together.

Rank r of R holds the r-th of R equal slices of every batch. All ranks hold the same weights and
change them alike, as they average what their slices gave before they use it. Files are the
first rank's business.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdhiera.config import TrainConfig
from kdhiera.devices import resolve_device
from kdhiera.errors import KdhieraError, MismatchError, UsageError

BUCKET_BYTES = 25_000_000  # of gradients that travel together, as in DDP
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}

_Made = TypeVar("_Made")


class RankLostError(KdhieraError):
    """Another rank has died or hangs; the run goes on from its checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those that train together; by default it is alone.

    Every method but `is_first` must be called by all ranks, in the same order.

    Args:
        rank: Its number, 0 .. size - 1.
        size: How many they are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether files and messages are this one's business."""
        return self.rank == 0

    def first(self, function: Callable[[], _Made]) -> _Made:
        """Let the first rank do something; all have what it returns, or raise what it raises.

        Only errors that a user can mend are raised everywhere; what it returns is pickled.
        """
        if self.size == 1:
            return function()
        told: list[Any] = [None, None]
        if self.is_first:
            try:
                told[0] = function()
            except KdhieraError as error:
                told[1] = error
        with _explained():
            dist.broadcast_object_list(told, src=0)
        made, refusal = told
        if refusal is not None:
            raise refusal
        return made  # type: ignore[no-any-return]

    def gather(self, value: _Made) -> list[_Made]:
        """What every rank holds, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _explained():
            dist.all_gather_object(found, value)
        return found

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        if self.size == 1:
            return flag
        said = torch.tensor([flag], dtype=torch.uint8)
        with _explained():
            dist.all_reduce(said, dist.ReduceOp.MAX)
        return bool(said)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the ranks, the same bits at each."""
        if self.size == 1:
            return value
        total = value.clone()
        with _explained():
            dist.all_reduce(total)
        return total / self.size

    def check_alike(self, what: str, values: Mapping[str, Any]) -> None:
        """Refuse to train together what is not the same.

        Raises:
            MismatchError: Naming the first value that differs, and the rank.
        """
        for rank, found in enumerate(self.gather(dict(values))):
            for name, value in found.items():
                if value != values[name]:
                    raise MismatchError(
                        f"{what} of rank {rank} and rank {self.rank} differ in {name} ({value!r}, "
                        f"{values[name]!r}): all ranks need the same config, the same cache and "
                        "one run_dir that they share"
                    )

    def num_clips(self, config: TrainConfig) -> int:
        """Clips of this rank in a step.

        Raises:
            UsageError: If a batch cannot be shared out evenly.
        """
        whole = self.size * config.accumulate
        if config.batch_size % whole:
            raise UsageError(
                f"train.batch_size is {config.batch_size}, which cannot be cut into {self.size} "
                f"(ranks) x {config.accumulate} (train.accumulate) equal parts: make it a multiple "
                f"of {whole}"
            )
        return config.batch_size // self.size


ALONE = Ranks()


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The ranks that a launcher's environment names, joined for the length of the block.

    `torchrun` and Ray Train set RANK, WORLD_SIZE, LOCAL_RANK and where they meet. Without them
    this process is alone. Processes that have met already (Ray Train's) have their GPUs. At the
    end they part, so that no rank waits for one that has failed.

    Args:
        device: `train.device`; on GPUs every rank takes the one of its number on its machine.

    Raises:
        UsageError: If there is no GPU for this rank, or the others cannot be met.
        RankLostError: If another rank dies.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    if not dist.is_initialized():
        kind = _own_device(device)
        try:
            dist.init_process_group(BACKENDS[kind])
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                f"the {size} ranks cannot meet ({_first_line(error)}): start them with torchrun, "
                "or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each"
            ) from error
    try:
        yield Ranks(rank=dist.get_rank(), size=dist.get_world_size())
    finally:
        dist.destroy_process_group()


def _own_device(name: str) -> str:
    """Make the rank's GPU the current one; returns the kind of device."""
    device = resolve_device(name)
    if device.type != "cuda":
        return device.type
    if device.index is not None:
        raise UsageError(
            f"train.device is {name}, but every rank needs a GPU of its own: write cuda"
        )
    place, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= found:
        raise UsageError(
            f"there is no GPU for rank {place} of this machine, which has {found}: start one rank "
            "a GPU, or set train.device=cpu"
        )
    torch.cuda.set_device(place)
    return device.type


class GradientMean:
    """Averages gradients over ranks, most of it while the backward pass still runs.

    Gradients travel in buckets that are filled from the last parameter to the first and sent
    in that order, each when all its gradients are there. What a bucket holds never changes, so
    that a run that goes on adds in the same order as one that was never stopped (DDP lays its
    buckets anew after a step; `docs/decisions/028-ranks.md`).

    Args:
        parameters: Of everything that is trained, the same at all ranks.
        ranks: Who takes part; alone nothing is done.
        bucket_bytes: Of gradients that travel together.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        ranks: Ranks,
        *,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self._ranks = ranks
        self._buckets = _buckets(parameters, bucket_bytes) if ranks.size > 1 else []
        self._missing = [0] * len(self._buckets)
        self._used: list[int] | None = None  # parameters that get a gradient, known after a step
        self._sent: list[tuple[Any, Tensor]] = []
        self._waiting = False
        for place, bucket in enumerate(self._buckets):
            for parameter in bucket:
                hook = functools.partial(self._arrived, place)
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def expect(self) -> None:
        """Call before the last backward pass of a step: its gradients are the sums."""
        self._waiting = True
        self._missing = list(self._used or (0 for _ in self._buckets))

    def finish(self) -> None:
        """Wait until every gradient is the mean over the ranks.

        Raises:
            RankLostError: If another rank dies.
        """
        self._waiting = False
        while len(self._sent) < len(self._buckets):
            self._send(self._buckets[len(self._sent)])
        for bucket, (work, flat) in zip(self._buckets, self._sent, strict=True):
            with _explained():
                work.wait()
            gradients = _gradients(bucket)
            pieces = torch.split(flat / self._ranks.size, [g.numel() for g in gradients])
            for gradient, piece in zip(gradients, pieces, strict=True):
                gradient.copy_(piece.view_as(gradient))
        self._sent = []
        self._used = [len(_gradients(bucket)) for bucket in self._buckets]

    def _arrived(self, place: int, _: Tensor) -> None:
        """A gradient is there: send the next buckets if they are whole."""
        if not self._waiting or self._used is None:
            return
        self._missing[place] -= 1
        while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
            self._send(self._buckets[len(self._sent)])

    def _send(self, bucket: Sequence[nn.Parameter]) -> None:
        gradients = _gradients(bucket)
        flat = torch.cat([g.flatten() for g in gradients]) if gradients else torch.zeros(0)
        with _explained():
            self._sent.append((dist.all_reduce(flat, async_op=True), flat))


def _gradients(bucket: Sequence[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in bucket if p.grad is not None]


def _buckets(parameters: Sequence[nn.Parameter], num_bytes: int) -> list[list[nn.Parameter]]:
    """Parameters from the last to the first, in groups that are full with their last one."""
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for parameter in reversed(parameters):
        if room <= 0:
            buckets.append([])
            room = num_bytes
        buckets[-1].append(parameter)
        room -= parameter.numel() * parameter.element_size()
    return buckets


@contextmanager
def _explained() -> Iterator[None]:
    """One sentence where torch tells of sockets."""
    try:
        yield
    except RuntimeError as error:
        raise RankLostError(
            f"another rank is gone ({_first_line(error)}): run the same command again, it goes on "
            "from the newest checkpoint"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
