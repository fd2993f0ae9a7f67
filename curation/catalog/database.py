"""Opens the catalog's database, SQLite or PostgreSQL, and hides the differences between the two.

Any number of processes write at once: every transaction is short, writers queue, and no connection outlives its
transaction, so none is ever shared after a fork. If the database is unavailable for a moment, this module waits and
repeats the whole transaction. It does not know what the tables mean.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError, NoSuchModuleError, OperationalError
from sqlalchemy.pool import NullPool

from curation.catalog.tables import metadata
from curation.failures import OutageError, UsageError
from curation.outages import wait_for

SCHEMA = "0003"  # the newest migration; lets an up-to-date database open without loading alembic
LOCK_TIMEOUT_S = 60.0
_ROOM_BYTES = 2**16  # with less free space, SQLite cannot write
_MIGRATION_LOCK = 0x756E6973  # PostgreSQL advisory lock: "unis"
_NAME = "The catalog's database"
# Detect a server that disappears silently within about a minute, not after the hours that TCP allows.
_NOTICE = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
_CHUNK = 500  # ids per statement and records per transaction: far below every database's limit on parameters

T = TypeVar("T")


class Database:
    """The database at an SQLAlchemy URL, `sqlite:///file` or `postgresql://...`; created or migrated when opened.

    Raises UsageError if it cannot be opened or written, or is of a newer version, and OutageError if it stays
    unavailable for too long. Safe to use after a fork.
    """

    def __init__(self, url: str) -> None:
        self._engine = _engine(url)
        self.is_sqlite = self._engine.dialect.name == "sqlite"
        self._opened = False
        try:
            if self.is_sqlite:
                wait_for(_NAME, self._use_wal, self._away)
            self.run(self._migrate, write=True)
        except DatabaseError as error:
            raise _refusal(error) from None
        self._opened = True

    def run(self, work: Callable[[sa.Connection], T], *, write: bool = False) -> T:
        """The result of `work` in a transaction on its own connection; a writer waits for its turn before it reads.

        If the database becomes unavailable at any point, `work` is called again when it is back. So `work` may change
        only the database, and must be safe to repeat after a commit of which only the answer was lost.
        """

        def once() -> T:
            with self._transaction(write) as connection:
                return work(connection)

        try:
            return wait_for(_NAME, once, self._away)
        except DatabaseError as error:
            if type(error) in (OperationalError, DatabaseError) or _state(error) == _NOT_ALLOWED:
                raise _refusal(error) from None  # the driver's own message names host and user
            raise  # other errors are bugs in this program

    @contextmanager
    def _transaction(self, write: bool) -> Iterator[sa.Connection]:
        with self._engine.connect() as connection:
            if self.is_sqlite:
                connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
            yield connection
            connection.commit()

    def _away(self, error: BaseException) -> str | None:
        """Why the database is unavailable, if this error means that it may be back soon; else None."""
        if not isinstance(error, DBAPIError):
            return None
        if isinstance(error.orig, sqlite3.Error):
            return None if self._disk_full() else _sqlite_away(error.orig, self._opened)
        return _postgresql_away(error, self._opened)

    def _disk_full(self) -> bool:
        """Whether SQLite's disk is full: SQLite then reports an I/O error, as for an unavailable disk."""
        try:
            return shutil.disk_usage(Path(str(self._engine.url.database)).parent).free < _ROOM_BYTES
        except OSError:
            return False

    def now(self, connection: sa.Connection) -> float:
        """Unix time by the clock that all processes share: the server's, or for SQLite this machine's."""
        if self.is_sqlite:
            return time.time()
        return connection.scalar(sa.text("SELECT extract(epoch FROM clock_timestamp())::float8"))

    def advisory_lock(self, connection: sa.Connection, what: str, *, shared: bool = False) -> float:
        """Wait for the exclusive lock `what`, hold it until the transaction ends, and return the time it was granted.

        shared: holders that all ask for a shared lock may hold it at once. No effect in SQLite, which has only one
        writer. Take the lock before any row lock.
        """
        if not self.is_sqlite:
            key = int.from_bytes(hashlib.sha256(f"unish {what}".encode()).digest()[:8], signed=True)
            lock = "pg_advisory_xact_lock_shared" if shared else "pg_advisory_xact_lock"
            connection.exec_driver_sql(f"SELECT {lock}({key})")
        return self.now(connection)

    def insert(self, table: sa.Table) -> sqlite.Insert | postgresql.Insert:
        """An INSERT that supports ON CONFLICT."""
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)

    def upsert(
        self,
        connection: sa.Connection,
        table: sa.Table,
        rows: list[dict[str, Any]],
        update: Sequence[str] | None = None,
    ) -> None:
        """Insert rows; where the primary key exists, update all columns, or only those named, if one differs."""
        if not rows:
            return
        insert = self.insert(table)
        keys = [column.name for column in table.primary_key]
        new = {name: insert.excluded[name] for name in (rows[0] if update is None else update) if name not in keys}
        changed = [] if update is None else [table.c[name].is_distinct_from(value) for name, value in new.items()]
        statement = (
            insert.on_conflict_do_update(
                index_elements=keys, set_=new, where=sa.or_(sa.false(), *changed) if changed else None
            )
            if new
            else insert.on_conflict_do_nothing(index_elements=keys)
        )
        connection.execute(statement, rows)

    def scrub(self) -> bool:
        """Rewrite the database without deleted bytes; False if other connections kept it busy."""
        try:
            with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                if not self.is_sqlite:
                    connection.exec_driver_sql(f"SET lock_timeout = '{LOCK_TIMEOUT_S:.0f}s'")
                    connection.exec_driver_sql(f"VACUUM (FULL) {', '.join(metadata.tables)}")
                    return True
                connection.exec_driver_sql("VACUUM")
                return not connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()[0]
        except OperationalError:
            return False

    def _use_wal(self) -> None:
        """Let readers run while a writer does. SQLite does not wait for locks at this switch, so this loop does."""
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                with self._engine.connect() as connection:
                    connection.exec_driver_sql("PRAGMA journal_mode=WAL")
                return
            except OperationalError as error:
                if "locked" not in str(error.orig) or time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    def _migrate(self, connection: sa.Connection) -> None:
        """Bring the schema to `SCHEMA`, one process at a time, all or nothing."""
        if not self.is_sqlite:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")
        version = None
        if sa.inspect(connection).has_table("alembic_version"):
            version = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
        if version != SCHEMA:
            _upgrade(connection, version)
        # changes nothing; on a read-only database it fails now, not after hours of work
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = version_num WHERE 1 = 0")


def chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """The items in chunks that fit into one statement."""
    return (items[first : first + _CHUNK] for first in range(0, len(items), _CHUNK))


def _engine(url: str) -> sa.Engine:
    """An engine without a pool: SQLite does not allow a connection that is shared after a fork."""
    try:
        parsed = sa.make_url(url)
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        arguments: dict[str, Any] = {}
        if parsed.get_backend_name() == "sqlite":
            if parsed.database in (None, "", ":memory:"):
                raise UsageError("The catalog cannot be in memory; give a file, such as sqlite:///out/catalog.sqlite.")
            arguments["timeout"] = LOCK_TIMEOUT_S
            if not parsed.database.startswith("file:"):
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        elif parsed.get_backend_name() != "postgresql":
            raise UsageError("The catalog must be SQLite or PostgreSQL; give a sqlite:/// or postgresql:// URL.")
        else:
            arguments = {name: value for name, value in _NOTICE.items() if name not in parsed.query}
        engine = sa.create_engine(
            parsed, poolclass=NullPool, connect_args=arguments, hide_parameters=True, json_serializer=_json
        )
    except (ArgumentError, ValueError):  # their messages quote the URL, with a password that has an @ or a colon in it
        raise UsageError(
            "The catalog URL is not valid; give sqlite:///file or postgresql://user@host/name, and write %40 for an @, "
            "%3A for a colon and %2F for a slash in a password."
        ) from None
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        raise UsageError("PostgreSQL needs its driver: pip install 'unish[postgres]'.") from error
    except OSError as error:
        raise UsageError("The catalog's folder cannot be created; choose another --out.") from error
    sqlite_ = engine.dialect.name == "sqlite"
    sa.event.listen(engine, "connect", _configure_sqlite if sqlite_ else _configure_postgresql)
    return engine


def _configure_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # else the driver begins transactions itself, too late for a writer
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute("PRAGMA synchronous=NORMAL")


def _configure_postgresql(connection: Any, _: object) -> None:
    # Otherwise a machine that disappears during a transaction keeps all others waiting for hours.
    connection.execute(f"SET idle_in_transaction_session_timeout = '{LOCK_TIMEOUT_S:.0f}s'")
    connection.commit()


def _upgrade(connection: sa.Connection, version: str | None) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    if version is not None and version not in {
        script.revision for script in ScriptDirectory.from_config(config).walk_revisions()
    }:
        raise UsageError("The catalog was written by a newer version of unish; upgrade unish, or choose another --out.")
    command.upgrade(config, "head")


def _sqlite_away(error: sqlite3.Error, opened: bool) -> str | None:
    code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL):
        return "another process has locked it for too long; if this lasts, end that process"
    if code == sqlite3.SQLITE_IOERR:
        return "its disk does not respond"
    if code == sqlite3.SQLITE_CANTOPEN and opened:
        return "its file cannot be opened at the moment"
    return None


# Keys are SQLSTATEs, or their two-character classes. Waiting helps with no others: a wrong password stays wrong.
_PASSING = {
    "08": "the connection broke",
    "57P01": "it is shutting down",
    "57P02": "it crashed",
    "57P03": "it is starting up or shutting down",
    "57P05": "it closed an idle connection",
    "25P03": "it ended an idle transaction",
    "53200": "it is out of memory",
    "53300": "it has too many connections",
    "58": "its disk does not respond",
    "40": "two transactions were in conflict",
}
# Messages of libpq and the server before a connection exists: there is no SQLSTATE then, only text.
_SAID = {
    "refused": "it refuses connections",
    "starting up": "it is starting up",
    "shutting down": "it is shutting down",
    "recovery mode": "it is recovering from a crash",
    "accepting connections": "it accepts no connections",
    "too many": "it has too many connections",
    "connection slots": "it has too many connections",
    "timeout": "it does not respond in time",
    "timed out": "it does not respond in time",
}
_NO_SUCH_HOST = "failed to resolve host"
_WRONG_OPTION = (
    " value: ",  # invalid sslmode value: "..."
    "invalid port number",
    "invalid integer value",
    "definition of service",
    "service file",
    "could not parse network address",
)
_SET_UP = (
    *_WRONG_OPTION,
    "password",
    "authentication",
    "does not exist",
    "pg_hba",
    "support ssl",
    "certificate",
    "permission denied",
)
_READ_ONLY, _NOT_ALLOWED = "25006", "42501"


def _state(error: DBAPIError) -> str | None:
    return getattr(error.orig, "sqlstate", None)


def _postgresql_away(error: DBAPIError, opened: bool) -> str | None:
    state, said = _state(error), str(error.orig).lower()
    if state is not None:
        if state == _READ_ONLY and opened:
            return "it is read-only at the moment"  # during a failover
        return _PASSING.get(state) or _PASSING.get(state[:2])
    if not isinstance(error, OperationalError) and not error.connection_invalidated:
        return None
    if _NO_SUCH_HOST in said:  # in a cluster, host names come and go with their servers
        return "its host name cannot be resolved at the moment" if opened or "temporary" in said else None
    if any(sign in said for sign in _SET_UP):
        return None
    return next((reason for sign, reason in _SAID.items() if sign in said), "the connection broke")


def _refusal(error: DatabaseError) -> UsageError | OutageError:
    """The error with a message of our own, because the driver's message names host, user and path."""
    said = str(error.orig).lower()
    if any(sign in said for sign in ("is full", "no space left", "disk i/o error")):
        return OutageError("The catalog's disk is full; free some space and run again: finished work is kept.")
    for sign, advice in (
        ("readonly", "it is read-only; make the file and its folder writable, or choose another --out"),
        ("read-only", "it is read-only; use a server that accepts writes and a user with write access"),
        ("unable to open", "its file cannot be opened; check that the folder exists and is writable"),
        ("not a database", "the file is not a database; move it away, or choose another --out"),
        ("malformed", "the file is damaged; restore it from a backup, or move it away and run again"),
        (_NO_SUCH_HOST, "its host name is unknown; correct it in the URL"),
        *((sign, "a connection option is wrong; correct it in the URL") for sign in _WRONG_OPTION),
        ("password", "the user or the password is wrong; correct them, in the URL or where libpq looks for them"),
        ("authentication", "the server rejects this user; correct the user or the server's rules"),
        ("pg_hba", "the server rejects this user from this machine; correct the server's rules"),
        ("does not exist", "there is no such database or user; create it, or correct the URL"),
        ("support ssl", "an encrypted connection is not possible; correct sslmode or the certificates"),
        ("certificate", "an encrypted connection is not possible; correct sslmode or the certificates"),
        ("permission denied", "this user lacks permissions; grant them"),
        ("no schema", "this user may not create tables in any schema; grant that permission, or set search_path"),
    ):
        if sign in said:
            return UsageError(f"The catalog cannot be used: {advice}.")
    kind = type(error.orig).__name__ + (f", SQLSTATE {state}" if (state := _state(error)) else "")
    return UsageError(f"The catalog cannot be used; check the database and run again ({kind}).")


def _json(value: Any) -> str:
    """Exactly the text that `sha256_json` hashes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
