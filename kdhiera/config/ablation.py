"""Many runs over one cache: what varies, over which seeds, and what is asked of the results."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from kdhiera.config.loading import apply, assign, parse, parse_run, read_raw
from kdhiera.config.run import RunConfig
from kdhiera.config.section import LocalFolder, Name, Section
from kdhiera.errors import UsageError

Changes = Mapping[str, Any]  # values by dotted key; a section without a dot is merged into

# A name of a variant is part of a path.
VariantName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,=+-]{0,100}$")]
MAX_NAME = 101
TAKEN = frozenset(  # by the ablation itself, beside the folders of the variants
    {"baselines", "records", "report", "report.md", "table.csv", "table.json", "table.md"}
)
# What the ablation decides for every run: a change to these would be lost.
OWN = {
    "name": "name the ablation",
    "run_dir": "`run_dir` of the ablation says it",
    "train.seed": "list `seeds`",
    "evaluate.seeds": "list `seeds`",
}


class MetricConfig(Section):
    """One number of an evaluation.

    Attributes:
        label: Name of the label.
        method: As in tables of results.
        readout: What the method reads, where it can read several things; None takes `mean`,
            or else what there is.
        features: Whose features.
        labels_per_class: Training labels a class; None means all.
    """

    label: str
    method: Literal["k-NN", "linear probe", "attentive probe", "fine-tuning"] = "linear probe"
    readout: str | None = None
    features: str = "distilled student"
    labels_per_class: int | None = None


class ContrastConfig(Section):
    """A difference that is asked for: one variant against another.

    Attributes:
        name: In plain words.
        variant: Name of a variant.
        against: Name of a variant; the same one if other features or methods are compared.
        metric: What is compared.
        against_metric: What it is compared with; None means the same.
        margin: Asks for non-inferiority: no worse by more than this share of the clips; None asks
            for superiority.
        primary: The one contrast of a question that is decided on, with Holm's correction.
    """

    name: str
    variant: str
    against: str
    metric: MetricConfig
    against_metric: MetricConfig | None = None
    margin: float | None = Field(None, gt=0, lt=1)
    primary: bool = False


class QuestionConfig(Section):
    """What the runs are to answer.

    Attributes:
        title: The question.
        claim: What would hold, in plain words.
        contrasts: Differences that answer it.
    """

    title: str
    claim: str = ""
    contrasts: tuple[ContrastConfig, ...] = Field(min_length=1)


class AblationConfig(Section):
    """Variants of a run, over seeds.

    Attributes:
        name: Of the report.
        run_dir: Gets `VARIANT/seed-N/` for every run, tables, plots and `report.md`.
        base: YAML file of the run that is varied.
        overrides: Changes to all variants.
        variants: Changes by name of variant; dotted keys replace, a section's name merges.
        grid: Values by dotted key: all combinations are variants. Either this or `variants`.
        baseline: Variant that the others are compared with; None means the first.
        seeds: Seeds of student, order and evaluation; every variant is run with each.
        per_seed: Further changes by seed, such as another fold of the data.
        metric: What the table is sorted by; None takes the linear probe of the first label, or
            whatever was measured first where there is none.
        questions: What is asked of the runs; without any, every variant is compared with the
            baseline.
        records: Folder that keeps what finished runs came to; None means `run_dir/records`. A run
            whose record is there is not run again, also where its weights are gone.
        cpus: CPUs of a run.
        gpus: GPUs of a run.
    """

    name: Name
    run_dir: LocalFolder
    base: str
    overrides: Changes = Field(default_factory=dict)
    variants: Mapping[VariantName, Changes] = {}
    grid: Mapping[str, tuple[Any, ...]] = {}
    baseline: str | None = None
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    per_seed: Mapping[int, Changes] = {}
    metric: MetricConfig | None = None
    questions: tuple[QuestionConfig, ...] = ()
    records: LocalFolder | None = None
    cpus: int = Field(1, ge=1)
    gpus: float = Field(0.0, ge=0)

    @field_validator("variants", mode="before")
    @classmethod
    def _empty_changes(cls, value: object) -> object:
        """`baseline:` with nothing behind it changes nothing."""
        if not isinstance(value, Mapping):
            return value
        return {str(name): changes or {} for name, changes in value.items()}

    @model_validator(mode="after")
    def _consistent(self) -> AblationConfig:
        if bool(self.variants) == bool(self.grid):
            raise ValueError("name either `variants` or a `grid`")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds repeats one: {list(self.seeds)}")
        self._check_grid()
        named: list[tuple[str, str]] = []
        if self.baseline is not None:
            named.append(("baseline", self.baseline))
        for question in self.questions:
            for contrast in question.contrasts:
                named.append((f"contrast `{contrast.name}`", contrast.variant))
                named.append((f"contrast `{contrast.name}`", contrast.against))
            if sum(contrast.primary for contrast in question.contrasts) > 1:
                raise ValueError(f"question `{question.title}` has more than one primary contrast")
        variants = self.changes
        if taken := sorted(TAKEN & variants.keys()):
            raise ValueError(f"a variant cannot be called `{taken[0]}`: the ablation's files are")
        for where, name in named:
            if name not in variants:
                raise ValueError(
                    f"{where} names `{name}`, but the variants are: {', '.join(variants)}"
                )
        return self

    def _check_grid(self) -> None:
        if empty := [key for key, values in self.grid.items() if not values]:
            raise ValueError(f"grid.{empty[0]} lists no value")
        count = math.prod(len(values) for values in self.grid.values())
        if self.grid and len(self.changes) < count:
            raise ValueError(
                "grid: two combinations would have the same name; name them under `variants`"
            )
        if too_long := [name for name in self.changes if len(name) > MAX_NAME]:
            raise ValueError(
                f"grid: `{too_long[0][:40]}...` is too long for the name of a folder; name the "
                "combinations under `variants`"
            )

    @property
    def changes(self) -> dict[str, Changes]:
        """Changes by name of variant, those of a grid named after their values."""
        if self.variants:
            return dict(self.variants)
        keys = list(self.grid)
        named: dict[str, Changes] = {}
        for values in itertools.product(*self.grid.values()):
            pairs = zip(keys, values, strict=True)
            name = ",".join(f"{key.rpartition('.')[2]}={_plain(value)}" for key, value in pairs)
            named[name] = dict(zip(keys, values, strict=True))
        return named

    @property
    def baseline_name(self) -> str:
        """The variant that the others are compared with."""
        return self.baseline or next(iter(self.changes))


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of an ablation.

    Args:
        variant: Its name.
        seed: Its seed.
        config: Everything resolved.
    """

    variant: str
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        """For messages and files."""
        return f"{self.variant}/seed-{self.seed}"


def load_ablation(
    path: str | Path, overrides: Sequence[str] = ()
) -> tuple[AblationConfig, tuple[PlannedRun, ...]]:
    """Read an ablation and resolve all of its runs, seed by seed.

    Args:
        path: Its YAML file.
        overrides: Dotted assignments to it, such as `seeds=[0,1]` or `overrides.train.epochs=3`.

    Returns:
        The ablation, and its runs with the first seed of all variants first.

    Raises:
        UsageError: With one sentence, which names the variant if one is wrong.
    """
    raw = read_raw(path)
    for override in overrides:
        apply(raw, override)
    ablation = parse(AblationConfig, raw, str(path))
    base = read_raw(ablation.base)
    runs = []
    for seed in ablation.seeds:
        for variant, changes in ablation.changes.items():
            own = copy.deepcopy(base)
            before = {key: _value(own, key) for key in OWN}
            for more in (ablation.overrides, changes, ablation.per_seed.get(seed, {})):
                _change(own, more)
            for key, way in OWN.items():
                if _value(own, key) != before[key]:
                    raise UsageError(f"{path}, variant {variant}: `{key}` cannot vary: {way}")
            own["name"] = ablation.name
            own["run_dir"] = f"{ablation.run_dir}/{variant}/seed-{seed}"
            assign(own, "train.seed", seed)
            if own.get("evaluate") is None:
                raise UsageError(
                    f"{ablation.base} has no `evaluate` section: name labelled shards there, or "
                    "the variants cannot be compared"
                )
            assign(own, "evaluate.seeds", [seed])
            config = parse_run(own, f"{path}, variant {variant}")
            runs.append(PlannedRun(variant=variant, seed=seed, config=config))
    return ablation, tuple(runs)


def _change(raw: dict[str, Any], changes: Changes) -> None:
    for key, value in changes.items():
        if "." not in key and isinstance(value, Mapping) and isinstance(raw.get(key), dict):
            _change(raw[key], value)
        else:
            assign(raw, key, copy.deepcopy(value))


def _value(raw: Mapping[str, Any], key: str) -> object:
    node: Any = raw
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _plain(value: object) -> str:
    """A value as a part of a file name."""
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "-", str(value))
    return name if isinstance(value, int | float) else name.strip("-") or "none"
