import subprocess
import sys

import numpy as np
import pytest

from kdhiera.cache.encoding import make_codec
from kdhiera.cache.layout import (
    STATUS,
    ZARR_SHARD_BYTES,
    ArraySpec,
    ColumnName,
    PartId,
    base_arrays,
    column_group,
    column_id,
    is_chunk_file,
    parse_column,
)
from kdhiera.grid import Grid


def test_columns_are_named_by_teacher_layer_and_encoding():
    assert column_id("image", "9", "int8") == "image.9.int8"
    assert parse_column("image.9.int8") == ColumnName(teacher="image", layer="9", encoding="int8")
    assert column_group("image.9.int8") == "targets.zarr/image/9.int8"


@pytest.mark.parametrize("layer", ["", "a.b", "../up", "a/b", "a b"])
def test_names_that_are_no_names_are_refused(layer: str):
    with pytest.raises(ValueError, match="cannot be part of a column's name"):
        column_id("image", layer, "int8")
    with pytest.raises(ValueError, match="not a column id"):
        parse_column(f"image.{layer}.int8")


@pytest.mark.parametrize("shard_id", ["", ".", "..", "a/b", "a\n", "a\x00b"])
def test_shard_ids_are_one_path_component(shard_id: str):
    with pytest.raises(ValueError, match="shard id"):
        PartId(shard_id=shard_id, view=0)


def test_parts_sort_by_shard_then_view():
    parts = [PartId(shard_id=s, view=v) for s in "ab" for v in (0, 2, 10)]
    assert sorted([parts[4], *parts[:4], parts[5]]) == parts


def test_reference_geometry_fills_blocks_of_128_rows_below_256_megabytes():
    grid = Grid(num_frames=16, height=224, width=224)
    kept = 160  # two draws at ratio 0.8
    specs = [*base_arrays(grid, kept).values()]
    specs += make_codec("int8", width=768).specs(kept).values()
    for spec in specs:
        assert spec.block_rows == 128
        assert spec.block_rows * spec.row_bytes <= ZARR_SHARD_BYTES


def test_only_rows_of_some_kilobytes_are_chunks_of_their_own():
    grid = Grid(num_frames=16, height=224, width=224)
    codec = make_codec("int8", width=768).specs(160)
    base = base_arrays(grid, 160)
    assert [n for n, spec in {**base, **codec}.items() if spec.row_chunks] == ["pixels", "codes"]
    assert not STATUS.row_chunks
    assert STATUS.block_rows == 1024


def test_large_rows_make_smaller_blocks():
    spec = make_codec("fp32", width=1024).specs(392)["codes"]
    assert spec.block_rows == ZARR_SHARD_BYTES // (392 * 4 * 1024 * 4)
    huge = ArraySpec(shape=(10**9,), dtype="uint8", axes=("row", "x"))
    assert huge.block_rows == 1


def test_axes_name_every_axis():
    grid = Grid(num_frames=4, height=64, width=64)
    for spec in [
        *base_arrays(grid, 4).values(),
        *make_codec("int8", width=8).specs(4).values(),
        *make_codec("fp32", width=8).specs(4).values(),
    ]:
        assert len(spec.axes) == 1 + len(spec.shape)
        assert spec.row_bytes == np.zeros(spec.shape, spec.dtype).nbytes


def test_chunk_files_are_told_from_metadata_whatever_the_names():
    assert is_chunk_file("base.zarr/units/c.0.0")
    assert is_chunk_file("targets.zarr/c/c.int8/codes/c.0.0.0.0")
    assert not is_chunk_file("targets.zarr/c/zarr.json")
    assert not is_chunk_file("rows.parquet")


def test_listing_a_cache_needs_neither_torch_nor_zarr():
    code = (
        "import sys, kdhiera.cache.commit; print({'torch', 'zarr', 'tensorstore'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
