"""What every test shares: databases, and a Hypothesis profile that does not mind a busy machine."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

import worker.schema  # noqa: F401 - its tables join the metadata before a database is made
from tests.databases import (
    database,
    postgresql_database,
    postgresql_server,
    postgresql_template,
    sqlite_database,
)

__all__ = ["database", "postgresql_database", "postgresql_server", "postgresql_template", "sqlite_database"]

settings.register_profile("rolecast", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("rolecast")
