"""What the cache keeps, how it is stored, how it is filled."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from kdhiera.config.section import Ratio, Section
from kdhiera.masking import MaskPlan, PlannedMasks, Scope, Strategy


class PlannedMasksConfig(Section):
    """Masks of one strategy that training may use.

    Attributes:
        strategy: Which units are preferred.
        ratio: Lowest mask ratio; None takes `masks.ratio`.
        draws: Masks a view; None takes `masks.draws`.
    """

    strategy: Strategy
    ratio: Ratio | None = None
    draws: int | None = Field(None, ge=1, le=1000)


class MaskPlanConfig(Section):
    """What training may show: the cache keeps the union of it.

    Attributes:
        keep: `plan` keeps what the strategies can show; `all` keeps every unit.
        strategies: Strategies that training may use: names, or mappings such as
            `{strategy: tube, ratio: 0.9, draws: 1}`.
        ratio: Lowest mask ratio that training may use, where a strategy names none.
        draws: Masks a view, where a strategy names none.
        scope: `slot` shows the same number of units in every slot; `clip` does not.
        seed: Mask seed.
    """

    keep: Literal["plan", "all"] = "plan"
    strategies: tuple[PlannedMasksConfig, ...] = Field(
        (PlannedMasksConfig(strategy=Strategy.ATTENTION),), min_length=1
    )
    ratio: Ratio = 0.8
    draws: int = Field(2, ge=1, le=1000)
    scope: Scope = Scope.SLOT
    seed: int = 0

    @field_validator("strategies", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        entries = [value] if isinstance(value, str | dict) else value
        if not isinstance(entries, list | tuple):
            return value
        return tuple({"strategy": e} if isinstance(e, str) else e for e in entries)

    @property
    def plan(self) -> MaskPlan:
        """What is kept, entries that another one contains left out."""
        entries = tuple(
            PlannedMasks(
                strategy=e.strategy,
                ratio=self.ratio if e.ratio is None else e.ratio,
                draws=self.draws if e.draws is None else e.draws,
            )
            for e in self.strategies
        )
        return MaskPlan(
            entries=entries, scope=self.scope, seed=self.seed, keep_all=self.keep == "all"
        ).canonical()


class CacheConfig(Section):
    """The teacher cache.

    Attributes:
        dir: Folder of the cache, or `s3://bucket/prefix`.
        encoding: How features are stored; see `docs/encodings.md`.
        compact_error: Share of a row's energy about the channel means that `compact` may lose.
        mode: `cached` trains from the cache, `live` runs decoder and teachers in the loop.
        allow_partial: Train although some shards, views or columns are not there yet.
    """

    dir: str
    encoding: Literal["fp32", "fp16", "bf16", "int8", "compact"] = "int8"
    compact_error: float = Field(0.017, ge=0.002, le=0.5)
    mode: Literal["cached", "live"] = "cached"
    allow_partial: bool = False


class ExtractConfig(Section):
    """How extraction runs; none of this changes what is stored.

    Attributes:
        device: `auto`, `cpu` or `cuda`.
        batch_size: Clips in one teacher pass; halved when memory runs out.
        num_actors: Ray actors; 0 means one a GPU, or one for every `cpus_per_actor`.
        cpus_per_actor: CPUs of an actor.
        max_attempts: Tries at a shard before it is given up.
        stall_seconds: An actor silent for longer is killed and replaced.
        lease_seconds: An attempt older than this may not publish any more.
        calibration_rows: Clips that the basis of a `compact` column is made from.
        probe_rows: Stored rows that are made again and compared before going on under other
            library versions; 0 goes on without.
    """

    device: str = "auto"
    batch_size: int = Field(16, ge=1)
    num_actors: int = Field(0, ge=0)
    cpus_per_actor: int = Field(1, ge=1)
    max_attempts: int = Field(3, ge=1)
    stall_seconds: float = Field(600.0, gt=0)
    lease_seconds: float = Field(24 * 3600.0, gt=0)
    calibration_rows: int = Field(64, ge=1)
    probe_rows: int = Field(4, ge=0)


class RayConfig(Section):
    """The Ray cluster.

    Attributes:
        enabled: Off runs the same code in this process.
        address: None starts Ray on this machine; `auto` or an address joins a cluster.
    """

    enabled: bool = True
    address: str | None = None
