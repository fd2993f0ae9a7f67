"""Turns and circuit breakers: how all workers together stay polite to a service.

A worker takes a turn and waits for it before it sends a request. When the service refuses a request, a breaker opens
for all workers; when the breaker lapses, one worker may test the service. All times are Unix seconds of the database's
clock. Never done here: sleeping, or deciding what a response of the service means.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import sqlalchemy as sa

from curation.catalog.database import Database
from curation.catalog.tables import breakers, turns
from curation.failures import FailureCode

HOUR_S = 3600.0
PROBE_S = 600.0  # how long one worker may test the service before another one may
LADDER_S = (0.25 * HOUR_S, HOUR_S, 4 * HOUR_S, 12 * HOUR_S)  # by consecutive blocks
LONGEST_S = 7 * 24 * HOUR_S  # the longest block that a service may ask for


@dataclass(frozen=True, slots=True)
class Turn:
    """When to send a request. `until` is the reserved Unix time by the database's clock, `wait_s` the time until then.

    If `blocked` is set, nothing was reserved, and `until` is when to take a turn again.
    """

    wait_s: float
    blocked: FailureCode | None = None
    until: float = 0.0


@dataclass(frozen=True, slots=True)
class Block:
    """A service that must not be asked before `until`, a Unix time of the database's clock, and why.

    left_s: the time until then when this was read; workers use it, because their own clocks may be wrong.
    """

    service: str
    session: str
    code: FailureCode
    until: float
    left_s: float = field(default=0.0, compare=False)


class Turns:
    """The part of a Catalog that keeps workers polite. A session is the unit the service counts by; it is opaque."""

    _database: Database

    def take_turn(
        self, service: str, session: str, *, per_hour: int, pause_s: float, patience_s: float = 900.0
    ) -> Turn:
        """Reserve the next time that is `pause_s` after the last and keeps each hour to `per_hour` turns (0: no limit).

        blocked: the breaker's code while it is open. When it lapses, one caller gets a turn to test the service; the
        others wait for the result, for up to 10 minutes. RATE_LIMITED if the wait would exceed `patience_s`.
        """
        mine = _of(turns, service, session)
        reserved: list[Turn] = []  # by an earlier call of `work` whose commit got no answer

        def work(connection: sa.Connection) -> Turn:
            now = self._database.advisory_lock(connection, f"turns\n{service}\n{session}")
            for turn in reserved:
                if connection.scalar(sa.select(sa.func.count()).where(mine, turns.c.at == turn.until)):
                    return replace(turn, wait_s=max(0.0, turn.until - now))
            breaker = self._breaker(connection, service, session)
            if breaker is not None and breaker.until > now:
                return Turn(breaker.until - now, FailureCode(breaker.code), breaker.until)
            connection.execute(sa.delete(turns).where(mine, turns.c.at < now - max(HOUR_S, pause_s)))
            latest = sa.select(turns.c.at).where(mine).order_by(turns.c.at.desc()).limit(1)
            last = connection.scalar(latest)
            at = now if last is None else max(now, last + pause_s)
            full = connection.scalar(latest.offset(per_hour - 1)) if per_hour else None
            if full is not None:
                at = max(at, full + HOUR_S)
            if at - now > patience_s:
                return Turn(at - now, FailureCode.RATE_LIMITED, at)
            connection.execute(sa.insert(turns).values(service=service, session=session, at=at))
            if breaker is not None:
                trying = {"until": at + PROBE_S, "probing": True}
                connection.execute(sa.update(breakers).where(_of(breakers, service, session)).values(trying))
            reserved.append(Turn(at - now, None, at))
            return reserved[-1]

        return self._database.run(work, write=True)

    def block(self, service: str, session: str, code: FailureCode, retry_after_s: float | None) -> float:
        """Open the breaker for 15 min, 1 h, 4 h, 12 h by consecutive blocks, or as long as asked, up to a week.

        The first block in a row lasts as long as the service asks, even if that is short; later ones last at least
        their step. While the breaker is open, another block counts as the same one and can only extend it. Returns its
        end.
        """
        asked_s = min(retry_after_s or 0.0, LONGEST_S)
        opened: list[tuple[float, int]] = []  # by an earlier call of `work` whose commit got no answer

        def work(connection: sa.Connection) -> float:
            now = self._database.advisory_lock(connection, f"turns\n{service}\n{session}")
            breaker = self._breaker(connection, service, session)
            if breaker is not None and (breaker.until, breaker.strikes) in opened:
                return breaker.until
            if breaker is not None and breaker.until > now and not breaker.probing:
                until = max(breaker.until, now + asked_s)
                connection.execute(sa.update(breakers).where(_of(breakers, service, session)).values(until=until))
                return until
            strikes = 1 if breaker is None else breaker.strikes + 1
            step_s = LADDER_S[min(strikes, len(LADDER_S)) - 1]
            until = now + (max(1.0, asked_s) if strikes == 1 and asked_s else max(step_s, asked_s))
            row = {"service": service, "session": session, "code": code.value, "until": until, "strikes": strikes}
            self._database.upsert(connection, breakers, [row | {"probing": False}])
            opened.append((until, strikes))
            return until

        return self._database.run(work, write=True)

    def unblock(self, service: str, session: str, *, force: bool = False) -> None:
        """The service responded normally: close the breaker; the next block is a first one again.

        A success reported while the breaker is open belongs to a request sent earlier; it is ignored unless `force`.
        """
        if self._database.run(lambda connection: self._breaker(connection, service, session)) is None:
            return  # nearly always there is nothing to write

        def work(connection: sa.Connection) -> None:
            now = self._database.advisory_lock(connection, f"turns\n{service}\n{session}")
            asked = [] if force else [sa.or_(breakers.c.probing, breakers.c.until <= now)]
            connection.execute(sa.delete(breakers).where(_of(breakers, service, session), *asked))

        self._database.run(work, write=True)

    def blocks(self) -> list[Block]:
        """The services that must not be asked now, including those that one worker is testing."""

        def work(connection: sa.Connection) -> list[Block]:
            now = self._database.now(connection)
            rows = connection.execute(sa.select(breakers).where(breakers.c.until > now)).all()
            return [Block(row.service, row.session, FailureCode(row.code), row.until, row.until - now) for row in rows]

        return sorted(self._database.run(work), key=lambda block: (block.service, block.session))

    def _breaker(self, connection: sa.Connection, service: str, session: str) -> sa.Row[Any] | None:
        return connection.execute(sa.select(breakers).where(_of(breakers, service, session))).first()


def _of(table: sa.Table, service: str, session: str) -> sa.ColumnElement[bool]:
    return (table.c.service == service) & (table.c.session == session)
