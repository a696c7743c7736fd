"""The least that any sender needs: for each line on stdin, two mails that were written before, on a connection that
stands. It answers as `tests.bench.publisher` does; the argument is the relay's port."""

from __future__ import annotations

import json
import smtplib
import sys
import time

from tests.bench.peers.mail import HOST, message, recipient


def main() -> None:
    """Send two mails for each event until stdin ends."""
    mail = message(recipient(0)).as_bytes().replace(b"\n", b"\r\n")
    with smtplib.SMTP(HOST, int(sys.argv[1])) as client:
        print("ready", flush=True)
        for line in sys.stdin:
            account = json.loads(line)["data"]["account"]
            began = time.time()
            for name in ("one", "two"):
                client.sendmail("support@bench.example", f"{name}@{account}.example", mail)
            print(f"{began:.6f}", flush=True)


if __name__ == "__main__":
    main()
