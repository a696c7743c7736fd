"""One process works at a time: whoever comes second learns who was first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from subscriptions.database import Database
from worker.lock import WorkLock

HOLD = """
import sys
from subscriptions.database import Database
from worker.lock import WorkLock
lock = WorkLock(Database(sys.argv[1]))
print(lock.take(), flush=True)
sys.stdin.readline()
"""


def test_only_one_has_the_lock_until_it_gives_it_back(database: Database) -> None:
    first, second = WorkLock(database), WorkLock(database)
    assert first.take()
    assert not second.take()
    assert not second.take()
    first.free()
    assert second.take()
    assert not first.take()
    second.free()


def test_giving_back_what_one_does_not_have_is_no_fault(database: Database) -> None:
    lock = WorkLock(database)
    lock.free()
    assert lock.take()
    lock.free()
    lock.free()
    assert lock.take()
    lock.free()


def test_the_holder_is_named_where_it_is_known(sqlite_database: Database) -> None:
    lock = WorkLock(sqlite_database)
    assert lock.holder() == ""
    assert lock.take()
    assert WorkLock(sqlite_database).holder() == str(os.getpid())
    assert not WorkLock(sqlite_database).take()
    assert WorkLock(sqlite_database).holder() == str(os.getpid())
    lock.free()


def test_a_killed_process_frees_the_lock_at_once(database: Database) -> None:
    # given a process that works
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, database.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "True\n"
    lock = WorkLock(database)
    assert not lock.take()
    # when it is killed
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=20)
    process.stdout.close()
    process.stdin.close()
    # then the next one has it; a server notices the lost connection within moments
    for _ in range(200):
        if lock.take():
            break
    else:
        raise AssertionError
    lock.free()
