"""An independent witness: what postfix's smtp-sink wrote down is what the ledger says."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from subscriptions.database import system_clock
from tests.bench.stage import free_port
from tests.house import event, house, publish
from tests.test_delivery import run
from worker import ledger

CROWD = {
    "id": "crowd",
    "catalogue": "billtrust",
    "contacts": [{"id": f"p{n}", "email": f"p{n}@crowd.example", "roles": ["secondary_support"]} for n in range(500)],
}


@dataclass
class SmtpSink:
    """A running smtp-sink and the file that it writes every mail to."""

    port: int
    dump: Path


@pytest.fixture
def smtp_sink(tmp_path: Path) -> Iterator[SmtpSink]:
    program = shutil.which("smtp-sink") or shutil.which("smtp-sink", path="/usr/sbin")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("smtp-sink is missing: install the package postfix")
        pytest.skip("postfix's smtp-sink is not on this machine")
    port, dump = free_port(), tmp_path / "mails"
    user = ["-u", "root"] if os.geteuid() == 0 else []  # it asks for a user where root starts it
    process = subprocess.Popen([program, *user, "-D", str(dump), f"127.0.0.1:{port}", "100"])
    for _ in range(100):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            time.sleep(0.05)
    yield SmtpSink(port, dump)
    process.terminate()
    process.wait()


def test_every_recipient_stands_once_in_the_files_of_an_independent_server(tmp_path: Path, smtp_sink: SmtpSink) -> None:
    with house(
        tmp_path,
        CROWD,
        clock=system_clock,
        relay_urls=f"smtp://127.0.0.1:{smtp_sink.port}?tls=none",
        public_url="https://notify.vendor.example",
    ) as app:
        publish(app, event("service.notice", accounts="all"))
        run(app)
        with app.database.read() as connection:
            assert ledger.totals(connection, 1) == {"accepted": 500}
    written = b"".join(path.read_bytes() for path in tmp_path.glob("mails*"))
    told = Counter(re.findall(rb"^X-Rcpt-Args: <([^>]+)>", written, re.MULTILINE))
    assert len(told) == 500
    assert set(told.values()) == {1}
