"""The ledger's statements: claims are won once, outcomes are recorded once, nothing that is owed is forgotten."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import insert, select

from subscriptions.database import Database
from tests.house import NOW, owed
from worker import feeding, leases, ledger
from worker.ledger import Claim, Lane, Settlement, Status
from worker.schema import deliveries, events, flights, slices

ALL_CLASSES = ("promotional", "informational", "operational", "transactional", "approval", "security")


def plan(database: Database, *, mails: int = 3, class_: str = "operational", lane: Lane = Lane.URGENT) -> None:
    """An event that is wholly planned."""
    with database.write() as connection:
        connection.execute(
            insert(events).values(
                ulid="U1", source="/s", ce_id="1", content_mac=b"", type="file.failed", category="file_failure",
                lane=int(lane), scope="one", accepted_at=NOW, mode="live", status="sending", sender_domain="v.example",
                bounce_domain="v.example", next_n=mails + 1, **{"class": class_},
            )
        )  # fmt: skip
        rows = [
            {"event_id": 1, "n": n, "mailbox_id": n, "account_id": 1, "contact_id": n, "shape_id": 1, "status": 0}
            for n in range(1, mails + 1)
        ]
        connection.execute(insert(deliveries), rows)
        ledger.add_tallies(connection, 0, {(1, Status.PLANNED): mails})
        feeding.make_slices(connection, 1, lane, first_n=1, last_n=mails, due_at=NOW)


def worker(database: Database, *, now: int = NOW) -> int:
    with database.write() as connection:
        return leases.register(connection, host="h", pid=1, lanes=list(Lane), now=now)


def claim(database: Database, owner: int, slice_id: int = 1) -> Claim | None:
    with database.write() as connection:
        return ledger.claim(connection, slice_id, owner, now=NOW)


def outcome(taken: Claim, n: int, status: Status, *, due_at: int | None = None) -> Settlement:
    return Settlement(
        event_id=1, numbers=[n], replies=["250"], slice_id=taken.slice_id, epoch=taken.epoch, flight_id=0,
        status=status, reason=None, attempted=True, due_at=due_at, relay="r", flown_at=NOW, at=NOW,
    )  # fmt: skip


def settle(database: Database, owner: int, *settlements: Settlement) -> int:
    with database.write() as connection:
        return ledger.settle(connection, owner, ledger.arrange(settlements, dialect=database.dialect))


def statuses(database: Database) -> list[int]:
    with database.read() as connection:
        return list(connection.execute(select(deliveries.c.status).order_by(deliveries.c.n)).scalars())


def test_a_slice_is_claimed_by_one_of_many(database: Database) -> None:
    plan(database)
    owners = [worker(database) for _ in range(8)]
    barrier = threading.Barrier(8)

    def attempt(owner: int) -> bool:
        barrier.wait()
        return claim(database, owner) is not None

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, owners)) == 1


def test_what_was_settled_is_not_settled_again(database: Database) -> None:
    plan(database)
    me = worker(database)
    taken = claim(database, me)
    assert taken is not None
    assert settle(database, me, outcome(taken, 1, Status.ACCEPTED)) == 1
    assert settle(database, me, outcome(taken, 1, Status.FAILED)) == 0
    assert statuses(database) == [Status.ACCEPTED, Status.PLANNED, Status.PLANNED]
    with database.read() as connection:
        assert ledger.totals(connection, 1) == {"accepted": 1, "planned": 2}


def test_each_outcome_is_recorded_with_its_own_reply_and_time_whatever_the_order_and_the_gaps(
    database: Database,
) -> None:
    plan(database, mails=40)
    me = worker(database)
    taken = claim(database, me)
    assert taken is not None
    rng = random.Random(7)
    numbers = rng.sample(range(1, 41), 30)
    settlements: list[Settlement] = []
    expected: dict[int, tuple[int, str | None, int, int | None]] = {}
    while numbers:
        some, numbers = numbers[: rng.randint(1, 5)], numbers[5:]
        if rng.random() < 0.5:
            some.sort()
        over, flown = rng.random() < 0.5, NOW + rng.randint(0, 2)
        due_at = None if over else NOW + rng.randint(1, 10**9)
        replies = [rng.choice([None, f"250 {n} 'ünï\"\\"]) for n in some]
        status = Status.ACCEPTED if over else Status.PLANNED
        made = outcome(taken, 0, status, due_at=due_at)
        settlements.append(made._replace(numbers=some, replies=replies, flown_at=flown))
        expected |= {n: (int(status), said, flown, due_at) for n, said in zip(some, replies, strict=True)}
    assert settle(database, me, *settlements) == len(expected)
    columns = (deliveries.c.status, deliveries.c.reply, deliveries.c.first_flight_at, deliveries.c.due_at)
    with database.read() as connection:
        stands = {row[0]: tuple(row[1:]) for row in connection.execute(select(deliveries.c.n, *columns))}
    assert stands == dict.fromkeys(range(1, 41), (0, None, None, None)) | expected


def test_who_lost_the_claim_records_acceptances_only(database: Database) -> None:
    plan(database)
    slow, quick = worker(database), worker(database)
    taken = claim(database, slow)
    assert taken is not None
    with database.write() as connection:
        leases.free_orphans(connection, quick, dead=None, now=NOW)
    again = claim(database, quick)
    assert again is not None
    assert again.epoch == taken.epoch + 1
    late = [outcome(taken, 1, Status.ACCEPTED), outcome(taken, 2, Status.FAILED)]
    assert settle(database, slow, *late) == 1
    assert statuses(database) == [Status.ACCEPTED, Status.PLANNED, Status.PLANNED]
    with database.write() as connection:
        assert owed(connection, again) == [2, 3]
        assert ledger.begin(connection, taken, slow, [2], now=NOW)[0] == 0, "it may begin no further flight"


@pytest.mark.parametrize(("class_", "expected"), [("operational", Status.PLANNED), ("transactional", Status.HELD)])
def test_what_a_vanished_worker_had_in_flight_is_sent_again_or_held_by_class(
    class_: str, expected: Status, database: Database
) -> None:
    plan(database, class_=class_)
    gone, rescuer = worker(database), worker(database)
    taken = claim(database, gone)
    assert taken is not None
    with database.write() as connection:
        ledger.begin(connection, taken, gone, [2], now=NOW)
        assert leases.free_orphans(connection, rescuer, dead=None, now=NOW) == 1
        assert connection.execute(select(flights)).all() == []
        attempts = connection.execute(select(deliveries.c.attempts).order_by(deliveries.c.n)).scalars().all()
    assert statuses(database) == [Status.PLANNED, expected, Status.PLANNED]
    assert attempts == [0, 1, 0], "what was not in flight was never attempted"
    assert claim(database, rescuer) is not None


def test_an_acceptance_that_is_learnt_late_settles_what_was_held_as_unknown(database: Database) -> None:
    plan(database, class_="transactional")
    slow, rescuer = worker(database), worker(database)
    taken = claim(database, slow)
    assert taken is not None
    with database.write() as connection:
        ledger.begin(connection, taken, slow, [1], now=NOW)
        ledger.begin(connection, taken, slow, [2], now=NOW)
        leases.free_orphans(connection, rescuer, dead=None, now=NOW)
    assert statuses(database) == [Status.HELD, Status.HELD, Status.PLANNED]
    assert settle(database, slow, outcome(taken, 1, Status.ACCEPTED), outcome(taken, 2, Status.FAILED)) == 1
    assert statuses(database) == [Status.ACCEPTED, Status.HELD, Status.PLANNED]
    with database.read() as connection:
        assert ledger.totals(connection, 1) == {"accepted": 1, "held": 1, "planned": 1}
        attempts = connection.execute(select(deliveries.c.attempts).order_by(deliveries.c.n)).scalars().all()
    assert attempts == [1, 1, 0]


def test_who_frees_a_slice_waits_for_a_flight_that_is_just_being_begun(postgresql_database: Database) -> None:
    plan(postgresql_database, class_="transactional")
    frozen, rescuer = worker(postgresql_database), worker(postgresql_database)
    taken = claim(postgresql_database, frozen)
    assert taken is not None

    def free() -> int:
        with postgresql_database.write() as connection:
            return leases.free_orphans(connection, rescuer, dead=None, now=NOW)

    with ThreadPoolExecutor(1) as pool:
        with postgresql_database.write() as connection:
            assert ledger.begin(connection, taken, frozen, [1], now=NOW)[0]
            freeing = pool.submit(free)
            time.sleep(0.3)  # frozen between the statement and its commit
            assert not freeing.done()
        assert freeing.result() == 1
    assert statuses(postgresql_database) == [Status.HELD, Status.PLANNED, Status.PLANNED]


def test_a_worker_whose_heart_beats_keeps_its_slices(database: Database) -> None:
    plan(database)
    alive, other = worker(database), worker(database)
    assert claim(database, alive)
    watch = leases.Watch(other, 30, longest_step=10)
    for second in range(0, 120, 5):
        with database.write() as connection:
            assert leases.beat(connection, alive, now=NOW - second * 1_000_000), "a clock that runs backwards"
            dead = watch.look(connection, at=second)
            assert leases.free_orphans(connection, other, dead=dead, now=NOW) == 0


def test_a_worker_whose_heart_is_silent_for_a_lease_loses_its_slices_and_learns_of_it(database: Database) -> None:
    plan(database)
    silent, other = worker(database), worker(database)
    assert claim(database, silent)
    watch = leases.Watch(other, 30, longest_step=10)
    freed = []
    for second in range(0, 45, 5):
        with database.write() as connection:
            dead = watch.look(connection, at=second)
            freed.append(leases.free_orphans(connection, other, dead=dead, now=NOW))
    assert freed == [0, 0, 0, 0, 0, 0, 1, 0, 0]
    with database.write() as connection:
        assert not leases.beat(connection, silent, now=NOW)
        assert leases.beat(connection, other, now=NOW)


def test_who_was_frozen_itself_calls_nobody_dead(database: Database) -> None:
    plan(database)
    silent, other = worker(database), worker(database)
    assert claim(database, silent)
    watch = leases.Watch(other, 30, longest_step=10)
    with database.write() as connection:
        assert watch.look(connection, at=0) == {}
        assert watch.look(connection, at=3600) == {}, "an hour without a look is one step of silence"


def test_a_heartbeat_that_comes_at_the_last_moment_saves_the_worker(database: Database) -> None:
    plan(database)
    late, other = worker(database), worker(database)
    assert claim(database, late)
    with database.write() as connection:
        dead = {late: NOW}
        assert leases.beat(connection, late, now=NOW + 1)
        assert leases.free_orphans(connection, other, dead=dead, now=NOW) == 0


def test_a_claim_that_nobody_works_on_is_given_back(database: Database) -> None:
    plan(database)
    me = worker(database)
    taken = claim(database, me)
    assert taken is not None
    with database.write() as connection:
        assert leases.owned(connection, me) == {taken.slice_id}
        assert leases.free_some(connection, me, {taken.slice_id}, now=NOW) == 1
        assert leases.owned(connection, me) == set()
    assert claim(database, me) is not None


def test_deferred_mail_comes_back_in_a_slice_of_its_own_when_it_is_due(database: Database) -> None:
    plan(database)
    me = worker(database)
    taken = claim(database, me)
    assert taken is not None
    settle(
        database, me, outcome(taken, 1, Status.ACCEPTED), outcome(taken, 2, Status.PLANNED, due_at=NOW + 60),
        outcome(taken, 3, Status.ACCEPTED),
    )  # fmt: skip
    with database.write() as connection:
        ledger.finish(connection, taken, me, now=NOW)
        assert feeding.ended(connection) == ([], 0)
        assert feeding.gather_retries(connection, now=NOW) == 0
        assert feeding.gather_retries(connection, now=NOW + 60) == 1
        chosen = list(feeding.take(connection, Lane.URGENT, room=4, now=NOW + 60).numbers)
        retry = ledger.claim(connection, chosen[0], me, now=NOW + 60)
        assert retry is not None
        assert retry.members == (2,)
        assert owed(connection, retry) == [2]
        late = [outcome(retry, 2, Status.ACCEPTED)]
        ledger.settle(connection, me, ledger.arrange(late, dialect=database.dialect))
        ledger.finish(connection, retry, me, now=NOW)
        assert feeding.ended(connection) == ([], 0), "its last slice ended it"
        assert connection.execute(select(events.c.status)).scalar_one() == "done"


def test_a_queue_that_lost_its_messages_is_filled_again(database: Database) -> None:
    plan(database)
    with database.write() as connection:
        assert list(feeding.take(connection, Lane.URGENT, room=4, now=NOW).numbers) == [1]
        assert list(feeding.take(connection, Lane.URGENT, room=4, now=NOW).numbers) == []
        assert feeding.forget_queued(connection, before=NOW) == 0
        assert feeding.forget_queued(connection, before=NOW + 1) == 1
        assert list(feeding.take(connection, Lane.URGENT, room=4, now=NOW).numbers) == [1]


def test_a_lane_holds_no_more_slices_than_it_has_room_for(database: Database) -> None:
    plan(database, mails=ledger.SLICE_SIZE * 5)
    with database.write() as connection:
        assert len(list(feeding.take(connection, Lane.URGENT, room=3, now=NOW).numbers)) == 3
        assert list(feeding.take(connection, Lane.URGENT, room=3, now=NOW).numbers) == []
        connection.execute(slices.update().where(slices.c.id == 1).values(done_at=NOW))
        assert len(list(feeding.take(connection, Lane.URGENT, room=3, now=NOW).numbers)) == 1


def test_each_class_travels_in_its_lane() -> None:
    lanes = {name: ledger.lane_of(name, broadcast=False) for name in ALL_CLASSES}
    assert lanes == {
        "promotional": Lane.BULK,
        "informational": Lane.BULK,
        "operational": Lane.URGENT,
        "transactional": Lane.NORMAL,
        "approval": Lane.URGENT,
        "security": Lane.URGENT,
    }
    assert {ledger.lane_of(name, broadcast=True) for name in ALL_CLASSES} == {Lane.BULK}
