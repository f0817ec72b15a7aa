from dataclasses import replace
from pathlib import Path

import pytest
from tiny_cache import (
    COLUMNS,
    SOURCE,
    add_column,
    config,
    content,
    folder_of,
    make_cache,
    write_part,
)

from kdhiera.cache.commit import Cache
from kdhiera.cache.fingerprint import base_identity, declared_base, declared_column
from kdhiera.cache.layout import PartId, commit_file, commit_folder
from kdhiera.cache.records import Missing, seal, unseal
from kdhiera.errors import DamagedError, MismatchError, UsageError
from kdhiera.masking import Strategy
from kdhiera.stores import LocalStore

A0, A1, B0 = (PartId(shard_id=s, view=v) for s, v in (("a-0", 0), ("a-0", 1), ("b-0", 0)))


def test_opening_what_is_not_there_says_how_to_make_it(tmp_path: Path):
    with pytest.raises(UsageError, match=r"no cache in .*kdhiera extract-teachers"):
        Cache.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="no cache in"):
        Cache.open(tmp_path / "file")


def test_a_folder_with_other_things_is_not_made_a_cache(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(UsageError, match="holds files but no cache"):
        make_cache(tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        make_cache(tmp_path / "thesis.tex")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_cache_that_another_run_makes_meanwhile_is_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It is made after this run saw that there is none, and before it lists the folder."""
    listing = LocalStore.names

    def late(self: LocalStore, folder: str) -> list[str]:
        monkeypatch.setattr(LocalStore, "names", listing)
        make_cache(tmp_path / "cache")
        return self.names(folder)

    monkeypatch.setattr(LocalStore, "names", late)
    ours = make_cache(tmp_path / "cache")
    assert ours.fingerprint == Cache.open(tmp_path / "cache").fingerprint
    assert ours.columns.names() == tuple(sorted(COLUMNS))


def test_a_cache_opens_again_with_its_grid_and_plan(tmp_path: Path):
    made = make_cache(tmp_path / "new" / "cache")
    cache = Cache.open(tmp_path / "new" / "cache")
    assert cache.identity == made.identity
    assert cache.fingerprint == made.fingerprint
    assert cache.grid == config().clip.grid
    assert cache.mask_plan == config().mask_plan
    assert cache.max_kept == 4
    assert cache.columns.names() == tuple(sorted(COLUMNS))
    make_cache(tmp_path / "new" / "cache")  # and for the same config it opens


def test_another_base_is_refused_with_a_table_and_nothing_changes(tmp_path: Path):
    make_cache(tmp_path)
    before = (tmp_path / "cache.json").read_bytes()
    other = base_identity(config(views__seed=7), score_teacher={"weights_sha256": "33"})
    with pytest.raises(MismatchError) as refused:
        Cache.create_or_open(tmp_path, other, provenance={})
    lines = str(refused.value).splitlines()
    assert lines[1].split() == ["field", "want", "cache", "has"]
    assert lines[2].split() == ["scores.teacher.weights_sha256", '"33"', '"11"']
    assert lines[3].split() == ["views.seed", "7", "0"]
    assert "set cache.dir to another folder" in lines[4]
    assert (tmp_path / "cache.json").read_bytes() == before


def test_another_column_is_refused_with_a_table(tmp_path: Path):
    cache = make_cache(tmp_path)
    with pytest.raises(MismatchError) as refused:
        add_column(cache, "image.1.int8", weights="33")
    assert "column image.1.int8" in str(refused.value)
    assert str(refused.value).splitlines()[2].split() == ["weights_sha256", '"33"', '"22"']


def test_training_compares_what_the_config_declares(tmp_path: Path):
    cache = make_cache(tmp_path)
    cache.check(declared_base(config()), declared_only=True)
    cache.columns.check("image.1.int8", declared_column(config(), "image", "1"), declared_only=True)
    with pytest.raises(MismatchError, match=r"views\.frame_stride +2 +4"):
        cache.check(declared_base(config(views__frame_stride=2)), declared_only=True)
    with pytest.raises(MismatchError, match=r"no column image\.5\.int8 \(it has: image\.1\.int8, "):
        cache.columns.check("image.5.int8", {}, declared_only=True)


def test_another_format_is_refused(tmp_path: Path):
    cache = make_cache(tmp_path)
    body = unseal((tmp_path / "cache.json").read_bytes(), str(tmp_path))
    body["identity"]["format"] = 99
    (tmp_path / "cache.json").write_bytes(seal(body))
    with pytest.raises(MismatchError, match="has format 99"):
        Cache.open(Path(cache.url))


@pytest.mark.parametrize("name", ["cache.json", "columns/image.1.int8/column.json"])
def test_a_damaged_identity_is_noticed(tmp_path: Path, name: str):
    make_cache(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DamagedError, match=Path(name).name):
        Cache.open(tmp_path).columns.check("image.1.int8", {}, declared_only=True)


def test_what_is_missing_shrinks_as_parts_are_committed(tmp_path: Path):
    cache = make_cache(tmp_path)
    everything = Missing(base=True, columns=COLUMNS)
    assert cache.missing(A0, COLUMNS) == everything
    write_part(cache, A0, columns=COLUMNS[:1])
    assert cache.missing(A0, COLUMNS) == Missing(base=False, columns=COLUMNS[1:])
    assert not cache.missing(A0, COLUMNS[:1])
    assert cache.missing(A1, COLUMNS) == cache.missing(B0, COLUMNS) == everything


def test_the_list_of_commits_says_what_each_part_holds(tmp_path: Path):
    cache = make_cache(tmp_path)
    assert cache.commits() == {}
    write_part(cache, B0, content(B0, 7, bad=(0, 6)))
    write_part(cache, A1, columns=())
    write_part(cache, A0)
    found = cache.commits()
    assert list(found) == [A0, A1, B0]
    assert list(found[A1].columns) == []
    base, column = found[B0].base, found[B0].columns["video.2.int8"]
    assert (base.num_rows, base.array_rows) == (7, 5)
    assert base.statuses == {"decode_error": 2, "ok": 5}
    assert base.source == SOURCE
    assert (column.width, column.statuses, column.base_sha256) == (6, {"ok": 5}, base.sha256)
    on_disk = sum(p.stat().st_size for p in folder_of(cache, base).rglob("*") if p.is_file())
    listed = base.num_bytes + sum(c.num_bytes for c in found[B0].columns.values())
    shared = sum((folder_of(cache, base) / n).stat().st_size for n in ("stats.npz", "attempt.json"))
    assert abs(listed - on_disk) < shared + 1000  # group metadata is listed for both columns


def test_removing_a_commit_folder_removes_the_part(tmp_path: Path):
    cache = make_cache(tmp_path)
    write_part(cache, A0)
    for record in (tmp_path / commit_folder(A0)).iterdir():
        record.unlink()
    (tmp_path / commit_folder(A0)).rmdir()
    assert cache.commits() == {}
    write_part(cache, A0)
    assert not cache.missing(A0, COLUMNS)


def test_half_written_records_are_not_seen(tmp_path: Path):
    cache = make_cache(tmp_path)
    write_part(cache, A0)
    ((tmp_path / commit_folder(A0)) / ".image.norm.int8.json.0.tmp").write_bytes(b'{"bo')
    assert list(cache.commits()[A0].columns) == sorted(COLUMNS)


def test_a_column_of_another_base_record_is_refused(tmp_path: Path):
    cache = make_cache(tmp_path)
    write_part(cache, A0)
    (tmp_path / commit_file(A0, None)).unlink()
    with pytest.raises(DamagedError, match=r"a-0 view 0 .* have no base record.*extract-teachers"):
        cache.commits()
    kept = {c: (tmp_path / commit_file(A0, c)).read_bytes() for c in COLUMNS}
    for column in COLUMNS:
        (tmp_path / commit_file(A0, column)).unlink()
    write_part(cache, A0, content(A0, seed=1), columns=())
    for column, record in kept.items():
        (tmp_path / commit_file(A0, column)).write_bytes(record)
    with pytest.raises(DamagedError, match="belongs to another base record"):
        cache.part_commits(A0)


def test_a_record_in_the_wrong_place_is_refused(tmp_path: Path):
    cache = make_cache(tmp_path)
    write_part(cache, A0)
    (tmp_path / commit_folder(A0)).rename(tmp_path / "moved")
    (tmp_path / commit_folder(A1)).parent.mkdir(exist_ok=True)
    (tmp_path / "moved").rename(tmp_path / commit_folder(A1))
    with pytest.raises(DamagedError, match="is the record of a-0 view 0"):
        cache.commits()


def test_a_record_under_another_identity_is_refused(tmp_path: Path):
    cache = make_cache(tmp_path)
    write_part(cache, A0)
    (tmp_path / "columns" / "video.2.int8" / "column.json").unlink()
    add_column(cache, "video.2.int8", weights="44")
    with pytest.raises(DamagedError, match="committed under another identity"):
        Cache.open(tmp_path).commits()
    (tmp_path / "columns" / "video.2.int8" / "column.json").unlink()
    found = Cache.open(tmp_path).commits()  # a column without its identity is not there
    assert all("video.2.int8" not in commits.columns for commits in found.values())


def test_plan_of_an_opened_cache_names_what_it_does_not_cover(tmp_path: Path):
    make_cache(tmp_path)
    spec = replace(config().mask_schedule.widest, strategy=Strategy.TUBE, ratio=0.4)
    gaps = Cache.open(tmp_path).mask_plan.lacks(spec, draws=3, units_per_slot=4)
    assert len(gaps) == 1
    assert Strategy.TUBE in gaps[0]
