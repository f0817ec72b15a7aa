"""Columns of a cache: what each one is, and the basis that its encoding may need.

    columns/<column>/column.json              identity; whoever comes first makes it
    columns/<column>/basis-<fingerprint>.npz  made once, before the first part; every part's
                                              commit names its sha256

A column without `column.json` does not exist: commits of it that were left behind (it was
dropped meanwhile) are not seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kdhiera.cache.fingerprint import Identity, differences, fingerprint, table
from kdhiera.cache.layout import COLUMNS, basis_file, column_file, parse_column
from kdhiera.cache.records import seal, unseal
from kdhiera.errors import DamagedError, KdhieraError, MismatchError
from kdhiera.stores import Store

if TYPE_CHECKING:
    from kdhiera.cache.compact import Basis
    from kdhiera.cache.encoding import Codec

_KIND = "column identity"


class Columns:
    """The columns that a cache knows.

    Args:
        store: Where the cache lives.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._fingerprints: dict[str, str] = {}
        self._bases: dict[str, str] = {}

    def names(self) -> tuple[str, ...]:
        """Columns that the cache knows, sorted; a part may lack any of them."""
        found = self._store.names(COLUMNS)
        return tuple(name for name in found if self._store.exists(column_file(name)))

    def record(self, column: str) -> dict[str, Any] | None:
        """What was written when a column was created, or None if the cache does not know it.

        Raises:
            DamagedError: If it is damaged.
        """
        path = column_file(column)
        way_out = (
            f"Restore it from a copy, or run `kdhiera cache verify {self._store.url} --repair`, "
            "then `kdhiera extract-teachers CONFIG`"
        )
        try:
            data = self._store.read(path)
            body = unseal(data, f"{self._store.url}/{path}", kinds=(_KIND,))
        except FileNotFoundError:
            return None
        except DamagedError as error:
            raise DamagedError(f"{error}. {way_out}") from None
        if body["column"] != column or body["fingerprint"] != fingerprint(body["identity"]):
            raise DamagedError(
                f"{self._store.url}/{path} is not the record of column {column}. {way_out}"
            )
        return body

    def identity(self, column: str) -> Identity | None:
        """Identity of a column, or None if the cache does not know it."""
        body = self.record(column)
        return None if body is None else dict(body["identity"])

    def ensure(self, column: str, identity: Identity, *, provenance: Mapping[str, object]) -> None:
        """Create a column, or check that the one there is the same.

        Args:
            column: Column id.
            identity: From `fingerprint.column_identity`.
            provenance: Recorded if the column is created; decides nothing.

        Raises:
            MismatchError: With a table of the fields that differ.
        """
        if not self._store.exists(column_file(column)):
            body = {
                "kind": _KIND,
                "column": column,
                "identity": identity,
                "fingerprint": fingerprint(identity),
                "provenance": provenance,
            }
            self._store.create(column_file(column), seal(body))
        self.check(column, identity)

    def check(
        self, column: str, want: Mapping[str, object], *, declared_only: bool = False
    ) -> None:
        """Refuse a column that was made by another teacher or in another way.

        A column that was compared whole is that one for as long as this object lives: if it is
        dropped and made anew in another way, nothing more is written or read under its name.

        Args:
            column: Column id.
            want: Identity that the run asks for.
            declared_only: Compare only the fields that `want` has.

        Raises:
            MismatchError: If the cache does not have the column, or with a table of the
                fields that differ.
        """
        url = self._store.url
        has = self.identity(column)
        if has is None:
            there = ", ".join(self.names()) or "none"
            raise MismatchError(
                f"the cache in {url} has no column {column} (it has: {there}): run "
                "`kdhiera extract-teachers CONFIG` to add it"
            )
        different = differences(want, has, declared_only=declared_only)
        if different:
            raise MismatchError(
                f"column {column} of the cache in {url} was made in another way:\n"
                f"{table(different)}\n"
                "Change the config to what the cache has, give the teacher another name to make "
                f"a column of its own, or remove this one with `kdhiera cache drop {url} {column}`"
            )
        if not declared_only:
            self._fingerprints[column] = fingerprint(has)

    def fingerprint(self, column: str) -> str | None:
        """Fingerprint of a column, or None if the cache does not know it."""
        if column not in self._fingerprints:
            body = self.record(column)
            if body is None:
                return None
            self._fingerprints[column] = body["fingerprint"]
        return self._fingerprints[column]

    def still_there(self, column: str) -> bool:
        """Whether the column was neither dropped nor made anew since it was first looked at."""
        known = self._fingerprints.get(column)
        return known is not None and Columns(self._store).fingerprint(column) == known

    def publish_basis(self, column: str, data: bytes) -> None:
        """Store a column's basis unless there is one; whoever comes first decides.

        Raises:
            KdhieraError: If the column was removed meanwhile.
        """
        key = self.basis_key(column)
        if key is None:
            raise KdhieraError(
                f"column {column} was removed from the cache in {self._store.url} while its basis "
                "was being made; run the same command again"
            )
        self._store.create(key, data)

    def has_basis(self, column: str) -> bool:
        """Whether the column's basis is stored."""
        key = self.basis_key(column)
        return key is not None and self._store.exists(key)

    def basis_key(self, column: str) -> str | None:
        """File of a column's basis, whether or not it is there; None for an unknown column."""
        known = self.fingerprint(column)
        return None if known is None else basis_file(column, known)

    def basis(self, column: str) -> Basis | None:
        """A column's basis, or None if there is none.

        Raises:
            DamagedError: If it cannot be read, or has changed since it was read first.
        """
        from kdhiera.cache.encoding import basis_from_npz  # torch: not needed to list a cache

        data = self._read_basis(column)
        if data is None:
            return None
        sha256 = hashlib.sha256(data).hexdigest()
        if self._bases.setdefault(column, sha256) != sha256:
            raise self._bad_basis(column, "it has changed since it was read first")
        try:
            return basis_from_npz(data)
        except ValueError as error:
            raise self._bad_basis(column, str(error)) from None

    def basis_sha256(self, column: str) -> str | None:
        """Hash of a column's basis, or None if there is none."""
        if column not in self._bases:
            data = self._read_basis(column)
            if data is None:
                return None
            self._bases[column] = hashlib.sha256(data).hexdigest()
        return self._bases[column]

    def same_basis(self, column: str, sha256: str | None) -> bool:
        """Whether the column's basis is stored now and is the one that was read.

        Args:
            column: Column id.
            sha256: Of what was read; None if its encoding needs none.
        """
        data = None if sha256 is None else self._read_basis(column)
        return (None if data is None else hashlib.sha256(data).hexdigest()) == sha256

    def check_basis(self, column: str, sha256: str | None) -> None:
        """Refuse a basis that is not the one a part was encoded with.

        Args:
            column: Column id.
            sha256: What the part's commit names; None if its encoding needs none.

        Raises:
            DamagedError: If it is missing or another one.
        """
        if sha256 is not None and self.basis_sha256(column) != sha256:
            raise self._bad_basis(column, "it is not the one its parts were encoded with")

    def codec(self, column: str, width: int) -> Codec:
        """How a column's features are stored.

        Args:
            column: Column id.
            width: Channels.

        Raises:
            DamagedError: If it needs a basis that is missing or damaged.
        """
        from kdhiera.cache.encoding import NEEDS_BASIS, make_codec

        encoding = parse_column(column).encoding
        basis = self.basis(column)
        if basis is None and encoding in NEEDS_BASIS:
            raise self._bad_basis(column, "it is not there")
        return make_codec(encoding, width=width, basis=basis)

    def _read_basis(self, column: str) -> bytes | None:
        key = self.basis_key(column)
        try:
            return None if key is None else self._store.read(key)
        except FileNotFoundError:
            return None

    def _bad_basis(self, column: str, what: str) -> DamagedError:
        url = self._store.url
        return DamagedError(
            f"{url}/{self.basis_key(column)} is missing or damaged: {what}. Restore it from a "
            f"copy, or run `kdhiera cache verify {url} --repair` and `kdhiera extract-teachers "
            "CONFIG` to make the column anew"
        )
