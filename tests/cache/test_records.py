import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdhiera.cache.records import redact, seal, unseal
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


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("a/b c.tar", "a/b c.tar"),
        ("/data/x.tar?not-a-query", "/data/x.tar?not-a-query"),
        ("https://host:8080/x.tar?sig=secret&e=1#f", "https://host:8080/x.tar"),
        ("s3://user:secret@bucket/k/x.tar", "s3://bucket/k/x.tar"),
    ],
)
def test_secrets_of_urls_are_cut(path: str, shown: str):
    assert redact(path) == shown


def test_a_record_of_another_kind_is_refused():
    data = seal({"kind": "column", "width": 6})
    assert unseal(data, "x", kinds=("base", "column"))["width"] == 6
    with pytest.raises(DamagedError, match=r"base\.json is damaged: it is a column, not a base"):
        unseal(data, "base.json", kinds=("base",))
    with pytest.raises(DamagedError, match="it is a None, not a cache"):
        unseal(seal({}), "x", kinds=("cache",))
