"""What all sections of a config share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from kdhiera.addresses import without_file_scheme

Ratio = Annotated[float, Field(ge=0.0, lt=1.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Precision = Literal["auto", "fp32", "bf16"]
Colour = tuple[float, float, float]
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,40}$")]


def _on_this_machine(path: str) -> str:
    if "://" in path and not path.startswith("file://"):
        raise ValueError(
            "must be a folder on this machine or a mounted one: caches and shards may lie in "
            "buckets, runs may not"
        )
    return without_file_scheme(path)


LocalFolder = Annotated[str, AfterValidator(_on_this_machine)]


class Section(BaseModel):
    """Base of all sections: frozen; unknown keys and infinite numbers are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
