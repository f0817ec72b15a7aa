import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdhiera.cache.records import seal, unseal
from kdhiera.errors import DamagedError


def test_sealed_records_come_back():
    body = {"b": [1, 2.5, None], "a": {"ü": "x"}}
    assert unseal(seal(body), "x") == body
    assert seal(body) == seal(dict(reversed(body.items())))


@given(st.data())
def test_any_changed_missing_or_added_byte_is_noticed(data: st.DataObject):
    sealed = seal({"kind": "base", "rows": 3})
    where = data.draw(st.integers(0, len(sealed) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda b: b != sealed[where]))
    for damaged in (
        sealed[:where] + bytes([byte]) + sealed[where + 1 :],
        sealed[:where],
        sealed + sealed[where:],
    ):
        with pytest.raises(DamagedError, match=r"record\.json is damaged"):
            unseal(damaged, "record.json")


def test_a_record_of_another_kind_is_refused():
    data = seal({"kind": "column", "width": 6})
    assert unseal(data, "x", kinds=("base", "column"))["width"] == 6
    with pytest.raises(DamagedError, match=r"base\.json is damaged: it is a column, not a base"):
        unseal(data, "base.json", kinds=("base",))
    with pytest.raises(DamagedError, match="it is a None, not a cache"):
        unseal(seal({}), "x", kinds=("cache",))
