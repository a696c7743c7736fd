"""Which processes work: with `memory://` one at a time, for each has a queue of its own; with `redis://` any number.

With SQLite it is a lock on a file beside the database, which the system frees when the process ends, however it ends;
with PostgreSQL an advisory lock on a connection kept for it. Workers on `redis://` share it, so that no lone one works
beside them. Whoever gets it alone knows that every earlier claim is an orphan.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from typing import IO

from sqlalchemy import Connection, text

from subscriptions.database import Database, DatabaseUnusable

ADVISORY_LOCK = 7_665_632_015
#: "rolecast" in the one number space of PostgreSQL's advisory locks.


class WorkLock:
    """The right to work on a database, for as long as it is held; `shared` with others of the same kind."""

    def __init__(self, database: Database, *, shared: bool = False) -> None:
        self._database = database
        self._shared = shared
        self._file: IO[str] | None = None
        self._connection: Connection | None = None

    def take(self) -> bool:
        """Take the lock, without waiting; False where another process has it. Raises `DatabaseUnusable`."""
        if self._database.path is not None:
            return self._take_file()
        with self._database.translated():
            connection = self._database.engine.connect()
            function = "pg_try_advisory_lock_shared" if self._shared else "pg_try_advisory_lock"
            taken = connection.execute(text(f"SELECT {function}(:key)"), {"key": ADVISORY_LOCK}).scalar_one()
            connection.commit()
        if not taken:
            connection.close()
            return False
        self._connection = connection
        return True

    def _take_file(self) -> bool:
        path = self._database.path
        assert path is not None
        file = path.with_name(path.name + ".work").open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return False
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        self._file = file
        return True

    def held(self) -> bool:
        """Whether it is still ours. A server that restarted has forgotten it: then it is taken again, if nobody did.

        Raises `DatabaseUnusable`.
        """
        if self._database.path is not None:
            return True
        if self._connection is not None:
            try:
                with self._database.translated():
                    self._connection.execute(text("SELECT 1"))
                    self._connection.commit()
            except DatabaseUnusable:
                self.free()
        return self._connection is not None or self.take()

    def holder(self) -> str:
        """The process number of whoever has it, where that is known; else an empty text."""
        if self._database.path is None:
            return ""
        with suppress(OSError):
            return self._database.path.with_name(self._database.path.name + ".work").read_text().strip()
        return ""

    def free(self) -> None:
        """Give it back."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._connection is not None:
            # The lock belongs to the session: given back to the pool, the connection would go on holding it.
            with suppress(DatabaseUnusable), self._database.translated():
                self._connection.invalidate()
                self._connection.close()
            self._connection = None
