"""The tables of the ledger, and of what workers share: limits of relays and domains, troubles, matters, notices.

What the states mean stands in `worker.ledger`. Times are microseconds UTC. Deliveries are written when they are
planned and when they are settled, never in between: "sending" is read from open flights.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from subscriptions.schema import Number, metadata

__all__ = ["metadata"]


def _checked_on_sqlite(**targets: str) -> list[ForeignKeyConstraint]:
    """Columns of the tables that planning fills, each with what it names.

    SQLite looks that up in passing. PostgreSQL would spend more on it than on writing the row, and lock what is named
    for each row: there it is left out, for events and accounts are never deleted.
    """
    made = [ForeignKeyConstraint([one], [targets[one]], info={"dialect": "sqlite"}) for one in targets]
    return [constraint.ddl_if(dialect="sqlite") for constraint in made]


events = Table(
    "events",
    metadata,
    Column("id", Number, primary_key=True),
    Column("ulid", Text, nullable=False, unique=True),
    Column("source", Text, nullable=False),
    Column("ce_id", Text, nullable=False),
    Column("content_mac", LargeBinary, nullable=False),  # keyed hash of what makes it the same fact (RFC 8785)
    Column("type", Text, nullable=False),
    Column("category", Text, nullable=False),
    Column("class", Text, nullable=False),
    Column("lane", SmallInteger, nullable=False),
    Column("scope", Text, nullable=False),  # one | list | all
    Column("routing", Text),  # JSON: account or accounts, products; emptied by purge
    Column("payload", Text),  # JSON: data and time as published; emptied by purge
    Column("accepted_at", BigInteger, nullable=False),
    Column("key_id", Number),  # the API key it came with, NULL from the command line
    Column("mode", Text, nullable=False),  # the key's: live | team | test
    Column("not_before", BigInteger),
    Column("expires_at", BigInteger),
    Column("status", Text, nullable=False),  # accepted planning sending done held cancelled redirected
    Column("outcome", Text),  # section 6's, for one account
    Column("reason", Text),
    Column("notes", Text),  # JSON list, told back to the publisher
    Column("status_page", Text),  # JSON: url and incident
    Column("sender_domain", Text, nullable=False),  # Message-ID stays the same on every attempt
    Column("bounce_domain", Text, nullable=False),  # and so does the envelope sender
    Column("plan_owner", Number),
    Column("plan_epoch", Integer, nullable=False, server_default="0"),
    Column("plan_after_account", Number, nullable=False, server_default="0"),
    Column("next_n", Integer, nullable=False, server_default="1"),
    Column("guard_at_plan", BigInteger, nullable=False, server_default="0"),  # moved since: check again before sending
    Column("planned_at", BigInteger),
    Column("cancelled_at", BigInteger),
    Column("purged_at", BigInteger),
    UniqueConstraint("source", "ce_id"),
    Index("ix_events_status_not_before", "status", "not_before"),
)

event_accounts = Table(  # scope list only
    "event_accounts",
    metadata,
    Column("event_id", Number, ForeignKey("events.id"), primary_key=True),
    Column("account_id", Number, ForeignKey("accounts.id"), primary_key=True),
    sqlite_with_rowid=False,
)

verdict_shapes = Table(
    "verdict_shapes",
    metadata,
    Column("id", Number, primary_key=True),
    Column("body", Text, nullable=False, unique=True),  # JSON: delivery, matched, dropped, deduplicated
)

verdicts = Table(
    "verdicts",
    metadata,
    Column("event_id", Number, primary_key=True),
    Column("account_id", Number, primary_key=True),
    Column("catalogue_version", Number, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("reason", Text),
    Column("warnings", Text, nullable=False),  # between commas
    Column("packed", LargeBinary, nullable=False),  # varints: distance to the contact before, shape
    *_checked_on_sqlite(event_id="events.id", account_id="accounts.id"),
    Index("ix_verdicts_account_id_event_id", "account_id", "event_id"),
    sqlite_with_rowid=False,
)

renditions = Table(
    "renditions",
    metadata,
    Column("id", Number, primary_key=True),
    Column("event_id", Number, ForeignKey("events.id"), nullable=False),
    Column("variant", Text, nullable=False),
    Column("locale", Text, nullable=False),
    Column("template_hash", Text, nullable=False),
    UniqueConstraint("event_id", "variant", "locale"),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("event_id", Number, primary_key=True),
    Column("n", Integer, primary_key=True),
    Column("mailbox_id", Number, nullable=False),
    Column("account_id", Number, nullable=False),  # the first ground; more in more_grounds
    Column("contact_id", Number, nullable=False),
    Column("shape_id", Number, nullable=False),
    Column("rendition_id", Number),
    Column("facts", Text),  # JSON: what was filled in for this recipient
    Column("status", SmallInteger, nullable=False),
    Column("reason", Text),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("due_at", BigInteger),  # set where a planned one waits: deferred
    Column("retry_slice", Number),  # the slice that carries it again
    Column("first_flight_at", BigInteger),  # its Date header, on every attempt
    Column("settled_at", BigInteger),
    Column("relay", Text),
    Column("reply", Text),  # the relay's last words, escaped
    *_checked_on_sqlite(event_id="events.id"),
    UniqueConstraint("event_id", "mailbox_id"),
    Index(
        "ix_deliveries_due_at",
        "due_at",
        sqlite_where=text("due_at IS NOT NULL"),
        postgresql_where=text("due_at IS NOT NULL"),
    ),
    Index(
        "ix_deliveries_event_id",
        "event_id",
        sqlite_where=text("due_at IS NOT NULL"),
        postgresql_where=text("due_at IS NOT NULL"),
    ),
    sqlite_with_rowid=False,
    # An outcome doubles a row: where its page has room for it, PostgreSQL leaves the indexes alone.
    postgresql_with={"fillfactor": "40"},
)

more_grounds = Table(
    "more_grounds",
    metadata,
    Column("event_id", Number, primary_key=True),
    Column("n", Integer, primary_key=True),
    Column("account_id", Number, primary_key=True),
    Column("contact_id", Number, primary_key=True),
    Column("shape_id", Number, nullable=False),
    sqlite_with_rowid=False,
)

slices = Table(
    "slices",
    metadata,
    Column("id", Number, primary_key=True),
    Column("event_id", Number, ForeignKey("events.id"), nullable=False),
    Column("lane", SmallInteger, nullable=False),
    Column("first_n", Integer, nullable=False),
    Column("last_n", Integer, nullable=False),
    Column("members", Text),  # JSON list of n: a slice of retries
    Column("due_at", BigInteger),  # NULL while further grounds may still be found for its mails
    Column("queued_at", BigInteger),
    Column("owner", Number),
    Column("epoch", Integer, nullable=False, server_default="0"),
    Column("done_at", BigInteger),
    Index(
        "ix_slices_lane_due_at",
        "lane",
        "due_at",
        sqlite_where=text("done_at IS NULL"),
        postgresql_where=text("done_at IS NULL"),
    ),
    Index(
        "ix_slices_lane_queued_at",
        "lane",
        "queued_at",
        sqlite_where=text("queued_at IS NOT NULL"),
        postgresql_where=text("queued_at IS NOT NULL"),
    ),
    Index(
        "ix_slices_owner", "owner", sqlite_where=text("owner IS NOT NULL"), postgresql_where=text("owner IS NOT NULL")
    ),
    Index(
        "ix_slices_event_id", "event_id", sqlite_where=text("done_at IS NULL"), postgresql_where=text("done_at IS NULL")
    ),
)

flights = Table(
    "flights",
    metadata,
    Column("id", Number, primary_key=True),
    Column("slice_id", Number, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("owner", Number, nullable=False),
    Column("members", Text, nullable=False),  # JSON list of n
    Column("begun_at", BigInteger, nullable=False),
    Index("ix_flights_slice_id", "slice_id"),
)

workers = Table(
    "workers",
    metadata,
    Column("id", Number, primary_key=True),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("lanes", Text, nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("beat_at", BigInteger, nullable=False),
)

tallies = Table(
    "tallies",
    metadata,
    Column("event_id", Number, primary_key=True),
    Column("owner", Number, primary_key=True),
    Column("status", SmallInteger, primary_key=True),
    Column("n", BigInteger, nullable=False),  # a change, not a count: sums over owners are the counts
    sqlite_with_rowid=False,
)

pauses = Table(
    "pauses",
    metadata,
    Column("scope", Text, primary_key=True),  # all | class | account | event | relay
    Column("value", Text, primary_key=True),
    Column("by", Text, nullable=False),
    Column("at", BigInteger, nullable=False),
)

paces = Table(  # a rate that all workers of the installation keep together
    "paces",
    metadata,
    Column("name", Text, primary_key=True),  # relay HOST:PORT | domain NAME
    Column("ready_at", BigInteger, nullable=False),  # when the next mail may go, had all before it been sent on time
)

relay_days = Table(
    "relay_days",
    metadata,
    Column("relay", Text, primary_key=True),
    Column("day", Integer, primary_key=True),  # days since 1970, UTC
    Column("mails", BigInteger, nullable=False),  # begun, whatever became of them
    sqlite_with_rowid=False,
)

domains = Table(  # destinations that refuse for now
    "domains",
    metadata,
    Column("domain", Text, primary_key=True),  # A-labels
    Column("failures", Integer, nullable=False),  # in a row
    Column("until_at", BigInteger, nullable=False),  # no mail goes there before
    Column("said", Text, nullable=False),  # the last answer, escaped
)

troubles = Table(  # what hinders a worker now: a relay, the queue, the feed, the disk
    "troubles",
    metadata,
    Column("kind", Text, primary_key=True),  # relay | queue | feed | disk
    Column("name", Text, primary_key=True),
    Column("owner", Number, primary_key=True),  # the worker that sees it
    Column("why", Text, nullable=False),  # one sentence, without secrets
    Column("since_at", BigInteger, nullable=False),
    Column("seen_at", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

matters = Table(  # what became of mails or accounts of an event that a person may have to look at, as it happened
    "matters",
    metadata,
    Column("event_id", Number, primary_key=True),
    Column("reason", Text, primary_key=True),
    Column("owner", Number, primary_key=True),  # the worker that saw it; sums over owners are the counts
    Column("n", BigInteger, nullable=False),  # how many mails (or accounts), ever
    Column("first_at", BigInteger, nullable=False),
    Column("last_at", BigInteger, nullable=False),
    Index("ix_matters_last_at", "last_at"),
    sqlite_with_rowid=False,
)

notices = Table(  # what operators were told
    "notices",
    metadata,
    Column("id", Number, primary_key=True),
    Column("made_at", BigInteger, nullable=False),
    Column("subject", Text, nullable=False),
    Column("body", Text, nullable=False),
    Column("told", Text, nullable=False),  # JSON: matter -> count or state, so that nothing is told twice
    Column("claimed_until", BigInteger, nullable=False),  # one worker sends it; after that another may
    Column("sent_at", BigInteger),
    Column("reply", Text),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Number, primary_key=True),
    Column("public_id", Text, nullable=False, unique=True),
    Column("secret_hash", LargeBinary, nullable=False),
    Column("name", Text, nullable=False, unique=True),
    Column("mode", Text, nullable=False),
    Column("scopes", Text, nullable=False),  # between spaces
    Column("created_at", BigInteger, nullable=False),
    Column("used_at", BigInteger),
    Column("revoked_at", BigInteger),
)

feed_state = Table(
    "feed_state",
    metadata,
    Column("one", Integer, primary_key=True),
    Column("body", Text, nullable=False),  # JSON of statuspage.FeedState: what the feed said last, and when
)
