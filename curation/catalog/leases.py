"""Leases: which worker holds which piece of work, so that any number of workers, on any machine, share one list.

A lease ends at a time of the database's clock. A live worker extends its leases; those of a dead worker lapse, and
another worker takes them. Unknown here: what the names stand for, and how work is divided.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import sqlalchemy as sa

from curation.catalog.database import Database, chunks
from curation.catalog.tables import leases

KEPT_S = 24 * 3600.0  # how long a lapsed lease is still shown


@dataclass(frozen=True, slots=True)
class Lease:
    """A name, its owner, and the seconds until the lease lapses; negative if it has lapsed."""

    name: str
    owner: str
    expires_in_s: float


class Leases:
    """The part of a Catalog that distributes work. Names and owners are opaque and reveal no host or path."""

    _database: Database

    def claim(self, names: Iterable[str], owner: str, seconds: float) -> frozenset[str]:
        """Lease to this owner, for `seconds`, those names that are free, lapsed or already its own; return them."""
        won: set[str] = set()
        for chunk in chunks(sorted(set(names))):
            won |= self._database.run(partial(self._claim, chunk, owner, seconds), write=True)
        return frozenset(won)

    def _claim(self, names: Sequence[str], owner: str, seconds: float, connection: sa.Connection) -> set[str]:
        # one at a time: two workers that claim the same names in different order must not deadlock
        now = self._database.advisory_lock(connection, "leases")
        rows = [{"name": name, "owner": owner, "expires_at": now + seconds} for name in names]
        insert = self._database.insert(leases).values(rows)
        new = insert.excluded
        free = (leases.c.owner == new.owner) | (leases.c.expires_at <= now)
        taken = insert.on_conflict_do_update(
            index_elements=["name"], set_={"owner": new.owner, "expires_at": new.expires_at}, where=free
        )
        won = set(connection.scalars(taken.returning(leases.c.name)))
        connection.execute(sa.delete(leases).where(leases.c.expires_at < now - KEPT_S))
        return won

    def extend(self, owner: str, seconds: float) -> frozenset[str]:
        """Extend all leases of this owner, lapsed or not, to `seconds` from now; return the names that are its own."""

        def work(connection: sa.Connection) -> frozenset[str]:
            until = self._database.advisory_lock(connection, "leases") + seconds
            mine = sa.update(leases).where(leases.c.owner == owner).values(expires_at=until)
            return frozenset(connection.scalars(mine.returning(leases.c.name)))

        return self._database.run(work, write=True)

    def holds(self, owner: str, name: str) -> bool:
        """Whether this name is still the owner's, lapsed or not: no other worker has taken it."""
        asked = sa.select(sa.func.count()).where(leases.c.owner == owner, leases.c.name == name)
        return bool(self._database.run(lambda connection: connection.scalar(asked)))

    def release(self, owner: str, names: Iterable[str] | None = None) -> None:
        """Release these, or all, of this owner's leases; those of other owners stay."""
        given = [None] if names is None else chunks(sorted(set(names)))
        for chunk in given:
            these = [] if chunk is None else [leases.c.name.in_(chunk)]
            mine = sa.delete(leases).where(leases.c.owner == owner, *these)
            self._database.run(partial(self._release, mine), write=True)

    def _release(self, mine: sa.Delete, connection: sa.Connection) -> None:
        self._database.advisory_lock(connection, "leases")
        connection.execute(mine)

    def leases(self) -> list[Lease]:
        """All leases, sorted by name, including those that lapsed within the last day."""

        def work(connection: sa.Connection) -> list[Lease]:
            now = self._database.now(connection)
            return [Lease(row.name, row.owner, row.expires_at - now) for row in connection.execute(sa.select(leases))]

        return sorted(self._database.run(work), key=lambda lease: lease.name)
