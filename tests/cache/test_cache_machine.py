"""A state machine: whatever happens, in whatever order, the cache is what a plain model says.

The model knows which rows and columns are committed and which bytes were damaged, nothing of
how the cache keeps them. After every step all that is committed reads right; while damage
that matters is outstanding, it reads right or is refused.
"""

import itertools
import json
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
from faults import dying
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from tiny_cache import (
    Content,
    assert_holds,
    begin,
    catch_up,
    content,
    fill,
    gc,
    make_cache,
)

from kdhiera.cache.commit import Cache
from kdhiera.cache.drop import drop_column
from kdhiera.cache.layout import PartId, commit_file, commit_folder
from kdhiera.cache.reader import CacheReader, read_base
from kdhiera.cache.repair import repair_at
from kdhiera.cache.verify import verify_at
from kdhiera.cache.writer import Attempt
from kdhiera.errors import DamagedError, KdhieraError

COLUMNS = ("image.1.fp32", "image.1.compact", "video.2.int8")
SHARDS = {"a-0": (), "b-0": (0, 2)}  # with bad rows
PARTS = [PartId(shard_id=shard, view=0) for shard in SHARDS]
COLUMN_SETS = st.sets(st.sampled_from(COLUMNS)).map(lambda s: tuple(sorted(s)))
LATER = 1e6


def of(part: PartId, seed: int) -> Content:
    return content(part, 3, bad=SHARDS[part.shard_id], seed=seed)


@dataclass
class Running:
    """An attempt that has not ended."""

    attempt: Attempt
    part: PartId
    seed: int
    columns: tuple[str, ...]
    bound: bool
    disturbed: bool = False  # what it is bound to was removed, or its own files were


class CacheMachine(RuleBasedStateMachine):
    """Attempts in any order, deaths, damage, repairs, drops and garbage collections."""

    @initialize()
    def create(self) -> None:
        self.patch = pytest.MonkeyPatch()
        numbers = itertools.count()  # names in one order every time
        self.patch.setattr(secrets, "token_hex", lambda n: f"{next(numbers):0{2 * n}x}")
        self.patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        memory = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
        self.root = self.folder / "cache"
        self.cache = make_cache(self.root, COLUMNS)
        self.rows: dict[PartId, int] = {}  # seed of the rows that are committed
        self.columns: dict[PartId, set[str]] = {}
        self.known = set(COLUMNS)
        self.damage: dict[str, bytes] = {}  # what stood in damaged files
        self.running: list[Running] = []

    # what extraction does

    @precondition(lambda self: not self.damaged())
    @rule(
        part=st.sampled_from(PARTS),
        seed=st.integers(0, 1),
        columns=COLUMN_SETS,
        bound=st.booleans(),
    )
    def begin_attempt(self, part: PartId, seed: int, columns: tuple[str, ...], bound: bool) -> None:
        if len(self.running) < 3:
            self.running.append(self.started(part, seed, columns, bound))

    @precondition(lambda self: self.running and not self.damaged())
    @rule(which=st.integers(0, 2))
    def commit(self, which: int) -> None:
        running = self.running.pop(which % len(self.running))
        try:
            result = running.attempt.commit()
        except KdhieraError:
            assert running.disturbed
            self.published_some(running)
            return
        part, wanted = running.part, set(running.columns)
        won = not running.bound and part not in self.rows
        assert result.won_base == won
        rows = self.rows.setdefault(part, running.seed)
        there = self.columns.setdefault(part, set())
        same = running.bound or rows == running.seed
        assert result.adopted == (not running.bound and not won and same)
        assert set(result.published) == (wanted - there if same else set())
        assert result.replay_needed == (not same and bool(wanted))
        there |= set(result.published)

    @precondition(lambda self: not self.damaged())
    @rule(
        part=st.sampled_from(PARTS),
        seed=st.integers(0, 1),
        columns=COLUMN_SETS,
        bound=st.booleans(),
        operation=st.integers(0, 250),
    )
    def attempt_and_die(
        self, part: PartId, seed: int, columns: tuple[str, ...], bound: bool, operation: int
    ) -> None:
        """At any file operation of an attempt, nothing being cleaned up."""
        self.know(columns)
        base = self.base(part) if bound else None
        seed = self.rows[part] if base else seed
        with dying(operation):
            attempt = begin(self.cache, part, columns, base=base)
            fill(attempt, of(part, seed), columns, rows=base is None)
            attempt.commit()
        self.note_what_was_made_anew()
        self.published_some(
            Running(attempt=None, part=part, seed=seed, columns=columns, bound=base is not None)
        )

    @rule(dies=st.booleans())
    def end_attempts(self, dies: bool) -> None:
        for running in self.running:
            if not dies:
                running.attempt.abandon()
        self.running.clear()

    # what goes wrong, and what looks after it

    @precondition(lambda self: len(self.damage) < 2)
    @rule(
        place=st.floats(0, 1, exclude_max=True),
        how=st.sampled_from(["flip", "cut", "remove"]),
        bit=st.integers(0),
    )
    def damage_a_file(self, place: float, how: str, bit: int) -> None:
        paths = [p for p in self.root.rglob("*") if p.is_file() and p.stat().st_size]
        paths = sorted(p for p in paths if self.name(p) not in self.damage)
        if how == "remove" and not self.rows:  # without it nothing here is a cache
            paths = [p for p in paths if p.name != "cache.json"]
        if not paths:
            return
        path = paths[int(place * len(paths))]
        sound = path.read_bytes()
        if how == "remove":
            path.unlink()
        elif how == "cut":
            path.write_bytes(sound[: bit % len(sound)])
        else:
            changed = bytearray(sound)
            changed[bit // 8 % len(sound)] ^= 1 << (bit % 8)
            path.write_bytes(changed)
        if how == "remove" and self.is_just_not_there(path):
            return
        self.damage[self.name(path)] = sound

    @rule()
    def verify(self) -> None:
        found = verify_at(self.root)
        assert bool(found.problems) == self.damaged(), [p.what for p in found.problems]

    @precondition(lambda self: self.damage)
    @rule()
    def repair_and_extract(self) -> None:
        """Once more where damage hid damage: no column is seen behind a damaged `cache.json`."""
        for running in self.running:  # what they are bound to may go
            running.disturbed = True
        for last in (False, False, True):
            repair_at(verify_at(self.root))
            try:
                self.extract_all()
                if not verify_at(self.root).problems:
                    break
            except DamagedError:
                if last:
                    raise
        else:
            raise AssertionError("three repairs do not mend it")
        self.damage = {}

    def extract_all(self) -> None:
        wanted = self.known.union(*self.columns.values())
        self.cache = make_cache(self.root, sorted(wanted))
        self.known = wanted
        for part, seed in self.rows.items():
            catch_up(self.cache, part, sorted(self.columns[part]), of(part, seed))
        for part in self.rows:
            self.expect(self.cache, part)

    @precondition(lambda self: "cache.json" not in self.damage)
    @rule(column=st.sampled_from(COLUMNS))
    def drop(self, column: str) -> None:
        if column not in self.known and not any(column in there for there in self.columns.values()):
            return
        drop_column(Cache.open(self.root), column)
        self.known.discard(column)
        for there in self.columns.values():
            there.discard(column)
        for running in self.running:
            running.disturbed |= column in running.columns
        for name in [n for n in self.damage if column in n and not n.startswith("parts/")]:
            del self.damage[name]
        self.reopen()

    @precondition(lambda self: "cache.json" not in self.damage)
    @rule(later=st.booleans())
    def collect_garbage(self, later: bool) -> None:
        before = self.named()
        found = gc(Cache.open(self.root), later=LATER if later else 0.0)
        assert self.named() == before
        damaged = {n.rpartition("/")[0] for n in self.damage if n.startswith("commits/")}
        lost = {n for n in self.damage if n.startswith("columns/")}
        assert bool(found.problems) <= bool(damaged | lost)
        if later:
            for running in self.running:
                running.disturbed = True
            named = {name.rpartition("/")[0] for name in before}
            for folder in self.root.glob("parts/*/*/*"):
                part = "/".join(self.name(folder).split("/")[1:3])
                inside = any(name.startswith(self.name(folder)) for name in named)
                assert inside or f"commits/{part}" in damaged

    @rule()
    def reopen(self) -> None:
        if "cache.json" not in self.damage:
            self.cache = Cache.open(self.root)

    # what is there

    @invariant()
    def what_is_committed_reads_right_or_is_refused(self) -> None:
        for part in self.rows:
            try:
                self.expect(Cache.open(self.root), part)
            except KdhieraError:
                if not self.damaged():
                    raise

    def expect(self, cache: Cache, part: PartId) -> None:
        """Exactly these rows and columns are there, and right."""
        commits = cache.part_commits(part)
        assert commits is not None
        assert set(commits.columns) == self.columns[part]
        columns, what = tuple(sorted(self.columns[part])), of(part, self.rows[part])
        reader = CacheReader(cache, num_views=1, columns=columns, shards=[part.shard_id])
        assert_holds(reader, {part: what}, columns)
        for column in columns:
            assert reader.statistics(column).count == len(what.tokens[column])
        found = read_base(cache, commits.base)
        assert list(found.rows) == list(what.rows)
        assert np.array_equal(found.scores, what.scores)

    def published_some(self, running: Running) -> None:
        """Of what an attempt would publish, in its order, a first part is there and no other."""
        part, folder = running.part, self.root / commit_folder(running.part)
        there = {p.name.removesuffix(".json") for p in folder.glob("[!.]*.json")}
        if "base" not in there:
            assert not there
            return
        if part not in self.rows:
            assert not running.bound
            self.rows[part], self.columns[part] = running.seed, set()
        known, new = self.columns[part], there - {"base"} - self.columns[part]
        assert known <= there
        same = running.bound or self.rows[part] == running.seed
        wanted = [column for column in running.columns if column not in known] if same else []
        assert sorted(new) == sorted(wanted[: len(new)])
        known |= new

    def started(self, part: PartId, seed: int, columns: tuple[str, ...], bound: bool) -> Running:
        self.know(columns)
        base = self.base(part) if bound else None
        seed = self.rows[part] if base else seed
        attempt = begin(self.cache, part, columns, base=base)
        self.note_what_was_made_anew()
        fill(attempt, of(part, seed), columns, rows=base is None)
        return Running(
            attempt=attempt, part=part, seed=seed, columns=columns, bound=base is not None
        )

    def know(self, columns: tuple[str, ...]) -> None:
        self.cache = make_cache(self.root, columns)
        self.known |= set(columns)
        self.note_what_was_made_anew()

    def note_what_was_made_anew(self) -> None:
        """Extraction, which goes on only if no damage matters, writes what it misses."""
        for name in [n for n in self.damage if n.startswith(("shards/", "columns/"))]:
            if (self.root / name).exists():
                del self.damage[name]

    def base(self, part: PartId):
        commits = self.cache.part_commits(part)
        assert (commits is None) == (part not in self.rows)
        return commits.base if commits else None

    # which damage matters

    def damaged(self) -> bool:
        return any(map(self.matters, self.damage))

    def matters(self, name: str) -> bool:
        there = (self.root / name).exists()
        kind, *rest = name.split("/")
        if kind == "cache.json":
            return True
        if kind == "shards":
            return there or any(part.shard_id == rest[0] for part in self.rows)
        if kind == "columns":
            return there or any(rest[0] in columns for columns in self.columns.values())
        return kind == "commits" or name in self.named()

    def is_just_not_there(self, path: Path) -> bool:
        """A record that is gone is nothing that was committed; columns cannot do without rows."""
        name = self.name(path)
        kind, *rest = name.split("/")
        for running in self.running:
            running.disturbed |= kind == "columns" and rest[0] in running.columns
        used = kind == "columns" and any(rest[0] in there for there in self.columns.values())
        if kind == "columns" and rest[1] == "column.json" and not used:
            self.known.discard(rest[0])
            return True
        if kind != "commits" or not rest[-1].endswith(".json"):
            return False
        part = PartId(shard_id=rest[0], view=int(rest[1]))
        column = rest[2].removesuffix(".json")
        for running in self.running:
            running.disturbed |= running.part == part
        if column != "base":
            self.columns[part].discard(column)
            return True
        if not self.columns[part]:
            del self.rows[part], self.columns[part]
            return True
        return False

    def named(self) -> set[str]:
        """Files that records name, by what these said before any damage."""
        files = set()
        for part, columns in self.columns.items():
            for column in (None, *columns):
                name = commit_file(part, column)
                data = self.damage.get(name)
                body = json.loads(data or (self.root / name).read_bytes())["body"]
                folder = f"parts/{part.shard_id}/{part.view}/{body['attempt']}"
                files |= {f"{folder}/{file}" for file in body["files"]}
        return files

    def name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def teardown(self) -> None:
        self.patch.undo()
        shutil.rmtree(self.folder)


# a death inside of zarr leaves coroutines behind
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
class TestCacheMachine(CacheMachine.TestCase):
    settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
