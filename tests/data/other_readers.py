"""Shards as readers other than ours find them."""

import io
import json
from pathlib import Path

from webdataset.tariterators import group_by_keys, tar_file_expander


def webdataset_samples(*shards: Path | bytes) -> list[dict]:
    """Samples as the webdataset library groups them, their JSON parsed."""
    opened = ({"url": "", "stream": io.BytesIO(_bytes(shard))} for shard in shards)
    samples = group_by_keys(tar_file_expander(opened))
    return [{**sample, "json": json.loads(sample["json"])} for sample in samples]


def _bytes(shard: Path | bytes) -> bytes:
    return shard if isinstance(shard, bytes) else shard.read_bytes()
