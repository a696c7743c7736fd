"""Mails of one flight that are written together: what is personal in them is made column by column.

A *sheet* is some mails of a flight. Those whose kind has a rendition, and whose values are plain (names, addresses and
ids of letters and digits: nothing to escape, to encode or to fold), get their values all at once; to write one of them
is then to fill in one template. The others are written one by one by the press.

Promises: equal bytes, whether by a sheet or by the press alone. Mails by a sheet are counted, and compared with
themselves in full, as those are that the press makes by a rendition.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import repeat
from typing import Final, NamedTuple

from worker import mime
from worker.fanout import EventRow
from worker.links import bounce_senders, named_deliveries
from worker.mails import Contact, Due, People
from worker.rendering import NAME_LENGTH, PLAIN_LABEL
from worker.renditions import Kind, Press, Rendition
from worker.transaction import Envelope

SHEET: Final = 64
#: Mails of a sheet: their values are made before the first of them is written, and nobody waits long for that.


_Addressed = tuple[Due, Contact, str, str]
"""A mail, its contact, its account's id and its account's name."""


class _Form(NamedTuple):
    """What the plain mails of one kind in a sheet are written with."""

    kind: Kind
    rendition: Rendition
    template: bytes
    eightbit: bool


class Sheet:
    """Some mails of one flight; `envelope` writes each of them once, in any order."""

    def __init__(
        self, press: Press, event: EventRow, dues: Sequence[Due], people: People, *, begun: int, eightbit: bool
    ) -> None:
        self._press = press
        self._event = event
        self._people = people
        self._begun = begun
        self._eightbit = eightbit
        self._made: dict[int, tuple[tuple[bytes, ...], str, str, _Form]] = {}  # n -> values, sender, recipient, form
        if press.shares(event) and not event.data.get("attachments"):
            with suppress(Exception):  # `envelope` raises it, for the mail alone that it is about (R20)
                for alike in self._alike(dues):
                    self._make(alike)

    def __len__(self) -> int:
        """How many of them have their values, and are not written yet."""
        return len(self._made)

    def envelope(self, due: Due) -> Envelope:
        """One mail, with what `Press.envelope` promises and raises."""
        press, event, people = self._press, self._event, self._people
        values, sender, recipient, form = self._made.pop(due.n, _NOTHING)
        if form is None or form.kind.rendition is not form.rendition:  # the latter showed that it differs
            return press.envelope(event, due, people, begun=self._begun, eightbit=self._eightbit)
        body, kind, eightbit = form.template % values, form.kind, form.eightbit
        kind.mails += 1
        if kind.mails < kind.checked_at:
            press.by_rendition += 1
        else:
            body = press.checked(event, due, people, kind, body, begun=self._begun, eightbit=self._eightbit)
            eightbit = self._eightbit and not body.isascii()
        return Envelope(sender, recipient, body, False, eightbit, True)  # by place, for names cost here

    def _alike(self, dues: Iterable[Due]) -> Iterable[Sequence[_Addressed]]:
        """The plain mails of one ground that may have one form."""
        contacts, accounts = self._people.contacts, self._people.accounts
        mails = []
        for due in dues:
            account, number, _ = due.grounds[0]
            if len(due.grounds) == 1 and due.first_flight_at is None and number in contacts:
                ext, name, _ = accounts[account]
                mails.append((due, contacts[number], ext, name or ext))
        if not _are_plain(mails):  # asked of all at once, for nearly always they are
            mails = [mail for mail in mails if _are_plain([mail])]
        found = defaultdict[tuple[object, ...], list[_Addressed]](list)
        for mail in mails:
            (account, _, shape), contact = mail[0].grounds[0], mail[1]
            found[id(shape), accounts[account][2], contact.locale, contact.timezone, len(mail[2])].append(mail)
        return found.values()

    def _make(self, alike: Sequence[_Addressed]) -> None:
        """Make the values of such mails, where their kind has a rendition."""
        press, event, (due, contact, ext, _) = self._press, self._event, alike[0]
        kind = press.kind_of(event, due, self._people, contact, eightbit=self._eightbit)
        rendition = kind.rendition
        if rendition is None or contact.locale not in kind.locales:
            return
        found = rendition.form(len(ext), eightbit=self._eightbit)
        if found is None:
            return
        (template, order), is_ascii = found
        named = named_deliveries(event.id, event.ulid, [(due.n, due.mailbox_key) for due, _, _, _ in alike])
        columns = press.composer.columns(named, alike, listed=kind.listed)
        recipients = [contact.email for _, contact, _, _ in alike]
        rows = zip(*order([*columns, *rendition.lines(columns, recipients, begun=self._begun)]), strict=False)
        senders = bounce_senders(press.address_key, named, domain=event.bounce_domain)
        form = _Form(kind, rendition, template, self._eightbit and not is_ascii)
        numbers = [due.n for due, _, _, _ in alike]
        self._made.update(zip(numbers, zip(rows, senders, recipients, repeat(form)), strict=False))


_NOTHING: Final = ((), "", "", None)


def _are_plain(mails: Sequence[_Addressed]) -> bool:
    """Whether mails say names and addresses of people, and ids and names of accounts, just as they are."""
    if not mails:
        return True
    names, addresses = [one.name for _, one, _, _ in mails], [one.email for _, one, _, _ in mails]
    accounts, titles = {ext for _, _, ext, _ in mails}, {title for _, _, _, title in mails}
    return (
        mime.are_plain_recipients(names, addresses)
        and all(map(PLAIN_LABEL.fullmatch, accounts))
        and max(map(len, titles)) <= NAME_LENGTH
        and mime.are_plain_names(titles)
    )
