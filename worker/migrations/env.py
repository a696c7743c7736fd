"""Alembic's door: runs the migrations on the connection it is given."""

from __future__ import annotations

from alembic import context

import worker.schema

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=worker.schema.metadata,
    render_as_batch=connection.dialect.name == "sqlite",
    transaction_per_migration=False,
)
with context.begin_transaction():
    context.run_migrations()
