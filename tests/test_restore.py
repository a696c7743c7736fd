"""A backup restored (reliability.md R31): what may have gone out since is reported and held, never sent by itself."""

from __future__ import annotations

import json
import os
import pty
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text, update
from typer.testing import CliRunner

from subscriptions.database import Database, system_clock
from subscriptions.schema import audit
from tests import invariants
from tests.house import ACME, DAY, GLOBEX, app_on, event, house, import_accounts, publish
from tests.smtpd import SmtpServer, reply
from tests.test_delivery import rows, run, states, vendor, working
from worker import decisions, leases, ledger, restore
from worker.app import App
from worker.cli import app as commands
from worker.ledger import Lane, Status
from worker.schema import deliveries, events, flights, slices, workers

EARLY = "2020-01-01T00:00:00Z"
#: A time at which nothing had been accepted yet, as a slip of the time zone gives one.


@pytest.fixture
def server() -> Iterator[SmtpServer]:
    with SmtpServer() as running:
        yield running


def saved(app: App, folder: Path) -> Path:
    """A backup of a SQLite database, as its own backup function makes it."""
    assert app.database.path is not None
    copy = folder / "backup.db"
    with closing(sqlite3.connect(app.database.path)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    return copy


def put_back(copy: Path, folder: Path) -> None:
    """The disk was lost, but for what stands beside the database; the backup takes its place."""
    for name in ("rolecast.db", "rolecast.db-wal", "rolecast.db-shm"):
        (folder / name).unlink(missing_ok=True)
    shutil.copyfile(copy, folder / "rolecast.db")


def restored(folder: Path, *words: str) -> Any:
    environment = {
        "ROLECAST_DATABASE_URL": f"sqlite:///{folder / 'rolecast.db'}",
        "ROLECAST_SENDER": "Vendor Support <support@vendor.example>",
    }
    return CliRunner().invoke(commands, ["db", "restored", *words], env=environment)


def publish_a_day(app: App, server: SmtpServer) -> None:
    """At the backup: one accepted, one deferred, one in flight, one planned and not begun, two not planned yet."""
    publish(app, event("invoice.issued", id="sent"))
    run(app)
    server.on("rcpt", reply(450), nth=2)
    publish(app, event("file.failed", id="deferred"))
    run(app)
    publish(app, event("file.failed", id="in flight"), event("invoice.issued", id="not begun"))
    publish(app, event("service.notice", id="not planned", accounts="all"))
    publish(app, event("service.notice", id="tomorrow", accounts="all", not_before="2999-01-01T00:00:00Z"))
    with app.database.write() as connection:
        number = leases.register(connection, host="gone", pid=1, lanes=list(Lane), now=app.clock())
        slice_id = connection.execute(select(slices.c.id).where(slices.c.event_id == 3)).scalar_one()
        taken = ledger.claim(connection, slice_id, number, now=app.clock())
        assert taken is not None
        assert ledger.begin(connection, taken, number, [1], now=app.clock())[0]


def test_what_was_owed_at_the_backup_is_held_and_sent_only_when_released(tmp_path: Path, server: SmtpServer) -> None:
    with vendor(tmp_path, server) as app:
        publish_a_day(app, server)
        copy = saved(app, tmp_path)
        app.clock.ahead = DAY // 24
        run(app)
        publish(app, event("invoice.issued", id="after the backup"))
        run(app)
    sent = len(server.accepted)
    assert sent == 7, "all but tomorrow's"
    put_back(copy, tmp_path)

    answer = restored(tmp_path, "--yes", "--json")
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["deliveries"] == 5
    assert "nobody knows which went out" in answer.stderr
    with vendor(tmp_path, server) as app:
        app.clock.ahead = DAY // 24
        invariants.check(app.database)
        before = invariants.standing(app.database)
        run(app)
        assert len(server.accepted) == sent, "nothing is sent by itself"
        assert invariants.moved_backwards(before, invariants.standing(app.database)) == []
        assert [states(app, number) for number in (1, 2, 3, 4)] == [
            {"accepted": 1}, {"held": 1}, {"held": 1}, {"held": 1}
        ]  # fmt: skip
        assert states(app, 5) == {"held": 2}
        assert {row.reason for row in rows(app, deliveries.c.reason, deliveries.c.status) if row.status == 5} == {
            "restored"
        }
        assert sorted(rows(app, events.c.id, events.c.status)) == [
            *((number, "done") for number in range(1, 6)),
            (6, "accepted"),
        ]
        assert (rows(app, flights), rows(app, workers)) == ([], [])
        assert sorted(rows(app, deliveries.c.event_id, deliveries.c.attempts)) == [
            (1, 1), (2, 1), (3, 1), (4, 0), (5, 0), (5, 0)
        ], "the flight was an attempt"  # fmt: skip
        said = max(rows(app, audit.c.id, audit.c.door, audit.c.body))
        assert (said.door, sum(json.loads(said.body)["held"].values())) == ("cli", 5)

        with app.database.write() as connection:
            assert decisions.release(connection, 3, numbers=None, reason="restored", now=app.clock()) == 1
        run(app)
        in_flight = dict(rows(app, events.c.id, events.c.ulid))[3]
        copies = [mail for mail in server.accepted if f"X-Rolecast-Event: {in_flight}".encode() in mail.body]
        assert states(app, 3) == {"accepted": 1}
        assert len(server.accepted) == sent + 1
        first, second = (mail.body.partition(b"Message-ID: ")[2].partition(b"\r\n")[0] for mail in copies)
        assert first == second, "whoever got it before can tell that it is the same mail"
        with app.database.write() as connection:  # the relay's log has this one
            assert decisions.settle(connection, 4, numbers=None, accepted=True, by="cli:test", now=app.clock()) == 1
        assert states(app, 4) == {"accepted": 1}
        again = publish(app, event("invoice.issued", id="after the backup"))
        assert not again[0].duplicate, "what was accepted after the backup is not known any more"
        run(app)
        invariants.check(app.database)


def test_running_it_again_holds_nothing_more(tmp_path: Path, server: SmtpServer) -> None:
    with vendor(tmp_path, server) as app:
        publish_a_day(app, server)
    assert json.loads(restored(tmp_path, "--yes", "--json").stdout)["deliveries"] == 5
    again = restored(tmp_path, "--yes", "--json")
    assert (again.exit_code, json.loads(again.stdout)["events"]) == (0, [])


def test_events_that_came_after_the_restore_are_left_alone(tmp_path: Path, server: SmtpServer) -> None:
    with vendor(tmp_path, server) as app:
        publish(app, event("invoice.issued", id="before"))
        app.clock.ahead = -DAY
        publish(app, event("invoice.issued", id="long before"))
    answer = restored(tmp_path, "--yes", "--json", "--since", EARLY)
    shown = json.loads(answer.stdout)
    assert (shown["deliveries"], shown["left_alone"]) == (0, {"deliveries": 2, "events": 2})
    assert f"2 mails of 2 events accepted after {EARLY} are left alone and will be SENT" in answer.stderr
    assert "no mail was owed" not in answer.stderr
    with vendor(tmp_path, server) as app:
        middle = app.clock() - DAY // 2
        assert [one.deliveries for one in hold(app, since=middle)] == [1]
        assert (states(app, 1), states(app, 2)) == ({"planned": 1}, {"held": 1})
        run(app)
        assert len(server.accepted) == 1


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "give --yes"),
        (("--yes", "--since", "yesterday"), 2, "2026-11-21T10:00:00Z"),
        (("--yes", "--since", "2999-01-01T00:00:00Z"), 2, "has not come yet"),
    ],
)
def test_what_was_not_said_clearly_changes_nothing(
    tmp_path: Path, words: tuple[str, ...], code: int, said: str
) -> None:
    with house(tmp_path, ACME, clock=system_clock) as app:
        publish(app, event("invoice.issued"))
        answer = restored(tmp_path, *words)
        assert (answer.exit_code, answer.stdout) == (code, "")
        assert said in answer.stderr
        assert states(app) == {"planned": 1}


def test_beside_a_living_worker_it_is_refused(tmp_path: Path, server: SmtpServer) -> None:
    with vendor(tmp_path, server) as app, working(app):
        answer = restored(tmp_path, "--yes")
        assert answer.exit_code == 4
        assert "stop it first" in answer.stderr


def test_a_worker_cut_off_from_its_server_counts_as_living_until_its_lease_ends(
    postgresql_database: Database, tmp_path: Path
) -> None:
    app = app_on(postgresql_database, tmp_path)
    with app.database.write() as connection:
        leases.register(connection, host="far", pid=7, lanes=list(Lane), now=app.clock())
    with pytest.raises(restore.StillWorking, match="process 7 on far"):
        hold(app)
    with app.database.write() as connection:
        connection.execute(update(workers).values(beat_at=app.clock() - 31_000_000))
    assert hold(app) == []
    assert rows(app, workers) == []


def hold(app: App, *, since: int | None = None) -> list[restore.Held]:
    """What is held where nobody was asked about what is left alone."""
    return restore.hold(
        app.database,
        app.planner,
        since=since,
        agree=lambda _later: False,
        actor="cli:test",
        lease_seconds=30,
        clock=app.clock,
    ).held


def test_every_way_of_being_owed_is_held(database: Database, tmp_path: Path) -> None:
    """Deferred, waiting for a person, in a slice of retries, half planned; cancelled with a mail in flight."""
    app = app_on(database, tmp_path)
    import_accounts(app, [ACME, GLOBEX])
    names = ("deferred", "waits", "retried", "cancelled")
    publish(app, *(event("invoice.issued", id=name) for name in names))
    publish(app, event("service.notice", id="half planned", accounts="all"))
    with app.database.write() as connection:
        due = update(deliveries).values(due_at=app.clock() + DAY)
        connection.execute(due.where(deliveries.c.event_id == 1))
        connection.execute(due.where(deliveries.c.event_id == 2).values(due_at=ledger.NEVER, reason="no_sender"))
        retries = connection.execute(select(slices.c.id).where(slices.c.event_id == 3)).scalar_one()
        connection.execute(update(slices).where(slices.c.id == retries).values(members="[1]"))
        connection.execute(update(deliveries).where(deliveries.c.event_id == 3).values(retry_slice=retries))
        flying = connection.execute(select(slices.c.id).where(slices.c.event_id == 4)).scalar_one()
        number = leases.register(connection, host="gone", pid=1, lanes=list(Lane), now=1)
        taken = ledger.claim(connection, flying, number, now=app.clock())
        assert taken is not None
        ledger.begin(connection, taken, number, [1], now=app.clock())
        decisions.cancel(connection, 4, by="cli:test", now=app.clock())
        connection.execute(update(events).where(events.c.id == 5).values(status="planning", plan_owner=number))
    assert [one.deliveries for one in hold(app)] == [1, 1, 1, 1, 2]
    invariants.check(app.database)
    assert set(rows(app, deliveries.c.status, deliveries.c.reason, deliveries.c.due_at, deliveries.c.retry_slice)) == {
        (int(Status.HELD), "restored", None, None)
    }
    assert all(row.done_at for row in rows(app, slices.c.done_at))
    assert rows(app, flights) == []
    assert hold(app) == []


# ---------------------------------------------------------------- an older database, recognised


def test_a_database_older_than_its_work_is_refused_until_the_command_has_run(
    tmp_path: Path, server: SmtpServer
) -> None:
    with vendor(tmp_path, server) as app:
        restore.refuse_if_older(app.database)
        restore.mark(app.database)
        copy = saved(app, tmp_path)
        restore.refuse_if_older(app.database)
        restore.mark(app.database)
        restore.refuse_if_older(app.database)
    put_back(copy, tmp_path)
    with vendor(tmp_path, server) as app, pytest.raises(restore.OlderDatabase, match="`rolecast db restored`"):
        restore.refuse_if_older(app.database)
    assert restored(tmp_path, "--yes").exit_code == 0
    with vendor(tmp_path, server) as app:
        restore.refuse_if_older(app.database)


def older(folder: Path, server: SmtpServer) -> None:
    """An older database: a mail waited for its planning at the backup, and went out after it."""
    with vendor(folder, server) as app:
        publish(app, event("invoice.issued", id="owed"))
        copy = saved(app, folder)
        run(app)
        restore.mark(app.database)
    put_back(copy, folder)


def is_refused(folder: Path, server: SmtpServer) -> bool:
    with vendor(folder, server) as app:
        try:
            restore.refuse_if_older(app.database)
        except restore.OlderDatabase:
            return True
    return False


def test_a_time_too_early_on_an_older_database_sends_nothing_again(tmp_path: Path, server: SmtpServer) -> None:
    older(tmp_path, server)
    answer = restored(tmp_path, "--yes", "--json", "--since", EARLY)
    assert (answer.exit_code, answer.stdout) == (4, "")
    assert f"1 mail of 1 event accepted after {EARLY} would be left alone and SENT" in answer.stderr
    assert "--send-later-events" in answer.stderr
    assert is_refused(tmp_path, server), "the workers still refuse it"
    again = restored(tmp_path, "--yes", "--json")
    assert (json.loads(again.stdout)["deliveries"], json.loads(again.stdout)["left_alone"]["deliveries"]) == (1, 0)
    assert not is_refused(tmp_path, server)


def test_whoever_says_that_later_events_were_not_sent_gets_them_sent(tmp_path: Path, server: SmtpServer) -> None:
    older(tmp_path, server)
    answer = restored(tmp_path, "--yes", "--since", EARLY, "--send-later-events")
    assert answer.exit_code == 0, answer.output
    assert f"1 mail of 1 event accepted after {EARLY} is left alone and will be SENT" in answer.stderr
    assert not is_refused(tmp_path, server)
    with vendor(tmp_path, server) as app:
        assert states(app, 1) == {"planned": 1}


@pytest.mark.parametrize(("typed", "code", "refused"), [(b"y\ny\n", 0, False), (b"y\nn\n", 1, True)])
def test_at_a_terminal_it_is_asked_whether_later_mail_may_be_sent(
    tmp_path: Path, server: SmtpServer, typed: bytes, code: int, refused: bool
) -> None:
    older(tmp_path, server)
    process, screen = at_a_terminal(tmp_path, typed, "--since", EARLY)
    assert process == code, screen
    assert f"1 mail of 1 event accepted after {EARLY} is left alone and will be SENT. Is it certain" in screen
    assert is_refused(tmp_path, server) is refused


def at_a_terminal(folder: Path, typed: bytes, *words: str) -> tuple[int, str]:
    """Run the command with somebody at its terminal: how it ended, and what stood on the screen."""
    ours, theirs = pty.openpty()
    environment = os.environ | {
        "ROLECAST_DATABASE_URL": f"sqlite:///{folder / 'rolecast.db'}",
        "ROLECAST_SENDER": "Vendor Support <support@vendor.example>",
    }
    command = [sys.executable, "-m", "worker.cli", "db", "restored", *words]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        os.write(ours, typed)
        screen = b""
        with suppress(OSError):  # the other end was closed
            while part := os.read(ours, 4096):
                screen += part
    os.close(ours)
    return process.returncode, screen.decode()


def test_what_is_left_alone_without_being_asked_for_renews_no_mark(tmp_path: Path, server: SmtpServer) -> None:
    with vendor(tmp_path, server) as app:
        publish(app, event("invoice.issued"))
    assert restored(tmp_path, "--yes", "--since", EARLY).exit_code == 0
    assert not (tmp_path / "rolecast.db.mark").exists()
    assert restored(tmp_path, "--yes").exit_code == 0
    assert (tmp_path / "rolecast.db.mark").exists()


def test_another_installation_in_the_same_place_is_not_taken_for_an_older_one(tmp_path: Path) -> None:
    with house(tmp_path, ACME) as app:
        restore.mark(app.database)
    for path in tmp_path.glob("rolecast.db*"):
        if path.name != "rolecast.db.mark":
            path.unlink()
    with house(tmp_path, ACME) as app:
        restore.refuse_if_older(app.database)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"nonsense", b"nonsense 99999999", b"1 2 3"])
def test_a_mark_that_says_nothing_accuses_nobody(tmp_path: Path, content: bytes) -> None:
    with house(tmp_path, ACME) as app:
        (tmp_path / "rolecast.db.mark").write_bytes(content)
        restore.refuse_if_older(app.database)
        restore.mark(app.database)
        restore.refuse_if_older(app.database)


def test_a_mark_that_cannot_be_written_stops_no_work(tmp_path: Path) -> None:
    with house(tmp_path, ACME) as app:
        (tmp_path / "rolecast.db.mark").mkdir()
        restore.mark(app.database)
        restore.refuse_if_older(app.database)
        assert rows(app, text("1")) == [(1,)]


def test_on_postgresql_nothing_is_marked(postgresql_database: Database) -> None:
    restore.mark(postgresql_database)
    restore.refuse_if_older(postgresql_database)
