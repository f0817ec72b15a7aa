import logging

import numpy as np
import pytest

from kdhiera.evaluation.kept import Kept, from_text_array, text_array

IDENTITY = {"what": "features", "weights": "abc", "seeds": [0, 1]}
ARRAYS = {"a": np.arange(500.0), "b c": text_array(["x/1/é", 3])}


@pytest.fixture
def kept(tmp_path):
    made = Kept(tmp_path / "new" / "kept")
    made.save(IDENTITY, ARRAYS)
    return made


def only_file(kept):
    (path,) = kept.folder.iterdir()
    return path


def test_what_was_saved_is_loaded(kept):
    loaded = kept.load(IDENTITY)
    assert set(loaded) == set(ARRAYS)
    assert (loaded["a"] == ARRAYS["a"]).all()
    assert from_text_array(loaded["b c"]) == ["x/1/é", 3]


def test_another_identity_is_not_there(kept):
    assert kept.load({**IDENTITY, "seeds": [0, 2]}) is None
    assert Kept(kept.folder / "nowhere").load(IDENTITY) is None


@pytest.mark.parametrize("where", [10, 0.3, 0.6, 0.95])
def test_a_flipped_byte_counts_as_absent(kept, caplog, where):
    path = only_file(kept)
    data = bytearray(path.read_bytes())
    data[int(where if where > 1 else where * len(data))] ^= 0xFF
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        loaded = kept.load(IDENTITY)
    assert loaded is None or all((loaded[k] == v).all() for k, v in ARRAYS.items())


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_cut_file_counts_as_absent(kept, caplog, size):
    path = only_file(kept)
    path.write_bytes(path.read_bytes()[:size])
    with caplog.at_level(logging.WARNING):
        assert kept.load(IDENTITY) is None
    assert "damaged" in caplog.text
    kept.save(IDENTITY, ARRAYS)
    assert kept.load(IDENTITY) is not None


def test_a_file_under_anothers_name_is_refused(kept, caplog):
    other = {**IDENTITY, "weights": "xyz"}
    kept.save(other, ARRAYS)
    kept._path(other).write_bytes(kept._path(IDENTITY).read_bytes())
    with caplog.at_level(logging.WARNING):
        assert kept.load(other) is None
    assert "something else" in caplog.text
