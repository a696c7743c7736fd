"""The tables of the directory: mailboxes, accounts, contacts, opt-outs, suppressions, audit, and the installation.

Row ids are numbers made here; `ext` is the id that people use. Times are microseconds UTC. The ledger's tables stand
in `worker.schema`, on the same metadata; the migrations in `worker/migrations` make both.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

Number = BigInteger().with_variant(Integer, "sqlite")
#: Only a column of type INTEGER is SQLite's own row number.

installation = Table(
    "installation",
    metadata,
    Column("one", Integer, primary_key=True),
    Column("address_key", LargeBinary, nullable=False),  # 32 bytes, made once: the key of mailboxes.address_key
    Column(
        "guard", BigInteger, nullable=False
    ),  # raised by opt-outs, suppressions, pauses, cancels: flights look at it
    Column("oldest_code", Integer, nullable=False),  # the oldest schema number whose code may still run
    CheckConstraint("one = 1", name="single"),
)

catalogue_versions = Table(
    "catalogue_versions",
    metadata,
    Column("id", Number, primary_key=True),
    Column("key", Text, nullable=False),
    Column("version", Text, nullable=False),  # a hash of the body
    Column("body", Text, nullable=False),  # the TOML as it was
    Column("since", BigInteger, nullable=False),
    UniqueConstraint("key", "version"),
)

mailboxes = Table(
    "mailboxes",
    metadata,
    Column("id", Number, primary_key=True),
    Column("address_key", LargeBinary, nullable=False, unique=True),  # 16 bytes: HMAC of the normalised address
    Column("address", Text),  # normalised; NULL once erased: the row stays, so that nobody is mailed again
)

accounts = Table(
    "accounts",
    metadata,
    Column("id", Number, primary_key=True),
    Column("ext", Text, nullable=False, unique=True),
    Column("name", Text, nullable=False),
    Column("catalogue", Text, nullable=False),
    Column("removed_at", BigInteger),
)

account_products = Table(
    "account_products",
    metadata,
    Column("product", Text, primary_key=True),
    Column("account_id", Number, ForeignKey("accounts.id"), primary_key=True),
    Index("ix_account_products_account_id", "account_id"),
    sqlite_with_rowid=False,
)

contacts = Table(
    "contacts",
    metadata,
    Column("id", Number, primary_key=True),
    Column("account_id", Number, ForeignKey("accounts.id"), nullable=False),
    Column("ext", Text, nullable=False),
    Column("position", Integer, nullable=False),  # the order of assignment: limits count in it
    Column("name", Text, nullable=False),
    Column("email", Text, nullable=False),  # as written: mail goes there
    Column("mailbox_id", Number, ForeignKey("mailboxes.id"), nullable=False),
    Column("kind", Text, nullable=False),  # person | group
    Column("roles", Text, nullable=False),  # sorted, a comma between two; empty = none
    Column("products", Text),  # sorted, a comma between two; NULL = all
    Column("locale", Text, nullable=False),
    Column("timezone", Text, nullable=False),
    Column("unreachable", Boolean, nullable=False),
    Column("removed_at", BigInteger),
    UniqueConstraint("account_id", "ext"),
    Index("ix_contacts_mailbox_id", "mailbox_id"),
)

opt_outs = Table(
    "opt_outs",
    metadata,
    Column("contact_id", Number, ForeignKey("contacts.id"), primary_key=True),
    Column("role", Text, primary_key=True),
    Column("category", Text, primary_key=True),
    Column("set_by", Text, primary_key=True),  # recipient | operator | import | complaint
    Column("mailbox_id", Number, ForeignKey("mailboxes.id"), nullable=False),  # the address it was set under
    Column("source", Text, nullable=False),  # the door and its detail, such as `import:acme.json`
    Column("set_at", BigInteger, nullable=False),
    Index("ix_opt_outs_mailbox_id_category", "mailbox_id", "category"),
    sqlite_with_rowid=False,
)

suppressions = Table(
    "suppressions",
    metadata,
    Column("mailbox_id", Number, ForeignKey("mailboxes.id"), primary_key=True),
    Column("cause", Text, primary_key=True),  # hard_bounce | complaint | operator | erased
    Column("source", Text, primary_key=True),  # `import:acme`, `delivery:ULID/7`, `operator:NAME`
    Column("at", BigInteger, nullable=False),
    Column("evidence", Text, nullable=False),
    Column("lifted_at", BigInteger),  # any row that is not lifted stands
    Column("lifted_by", Text),
    Index("ix_suppressions_source", "source"),  # an import looks at what it set before
    sqlite_with_rowid=False,
)

audit = Table(
    "audit",
    metadata,
    Column("id", Number, primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("actor", Text, nullable=False),  # who: `cli:USER`, `key:NAME`, `recipient:CONTACT-NUMBER`, `import:FILE`
    Column("door", Text, nullable=False),  # which way it came: cli | import | api | console | preferences | bounce
    Column("account_id", Number),
    Column("kind", Text, nullable=False),
    Column("body", Text, nullable=False),  # JSON: why, before and after, by row numbers: no address in it
    Index("ix_audit_account_id_at", "account_id", "at"),
)
