"""Who hears of an event, alone: verdicts with their reasons for a stream of contacts, on one core, in memory.

`python -m tests.bench.resolution CONTACTS` makes accounts as it goes, resolves them and prints one line of JSON: only
the time of `resolve` is counted, the memory is that of the whole process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from subscriptions.audience import AccountFacts, ContactFacts, EventFacts, resolve
from subscriptions.catalogue import load_catalogues
from tests.bench import machine
from tests.bench.installation import PROJECT
from tests.bench.stage import CONTACTS

PAGE = 500
#: Accounts that are made, then resolved, at a time.
EVENT = EventFacts("service_communication")
CONTACTS_OF_ACCOUNT = sum(how_many for _, how_many in CONTACTS)


def accounts(first: int, count: int) -> Iterator[AccountFacts]:
    """Accounts as in the benchmark's directory; one contact of twenty has product preferences, one of fifty opted out,
    one of a hundred is suppressed, and one account of ten has a second record for a mailbox."""
    for number in range(first, first + count):
        people = []
        for role, how_many in CONTACTS:
            for index in range(how_many):
                place = number * CONTACTS_OF_ACCOUNT + len(people)
                name = f"{role[0]}{index}"
                roles = (role, "business_user") if place % 7 == 0 else (role,)
                people.append(
                    ContactFacts(
                        id=name,
                        email=f"p0@a{number}.example"
                        if name == "c0" and number % 10 == 0
                        else f"{name}@a{number}.example",
                        roles=roles,
                        products=frozenset({"invoicing"}) if place % 20 == 0 else None,
                        opt_outs=frozenset({(role, EVENT.category)}) if place % 50 == 0 else frozenset(),
                        number=place,
                        mailbox=place,
                    )
                )
        suppressed = frozenset({people[1].email}) if number % 20 == 0 else frozenset[str]()
        yield AccountFacts(
            f"a{number}", "billtrust", frozenset({"invoicing"}), tuple(people), suppressed, number=number
        )


def stream(contacts: int) -> dict[str, Any]:
    """Resolve so many contacts: how many a second, how many hear, and how much memory it took."""
    catalogue = load_catalogues(("billtrust",))["billtrust"]
    spent, heard, judged = 0.0, 0, 0
    for first in range(0, contacts // CONTACTS_OF_ACCOUNT, PAGE):
        page = list(accounts(first, min(PAGE, contacts // CONTACTS_OF_ACCOUNT - first)))
        began = time.process_time()
        for account in page:
            verdicts = resolve(catalogue, account, EVENT)
            heard += len(verdicts.recipients)
            judged += len(verdicts.recipients) + len(verdicts.excluded)
        spent += time.process_time() - began
    own = machine.peaks_mb(os.getpid())[0]
    return {"contacts": judged, "recipients": heard, "contacts_a_second": judged / spent, "peak_mb": own}


def measure(contacts: int) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.resolution", str(contacts)]
    ran = subprocess.run(command, cwd=PROJECT, capture_output=True, check=True)
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


if __name__ == "__main__":
    print(json.dumps(stream(int(sys.argv[1]))))
