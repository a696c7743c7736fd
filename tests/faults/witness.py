"""The witness: the generator writes down what it is about to publish before each call, and the outcome after it.

One JSON object a line, flushed to the disk before the call is made, so that whatever a crash cuts off is known. Kinds
of lines: `audience` (a named set of addresses), `intent` (an event, and who should get it), `outcome`, `fault`.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.bench.stage import Stage

Answer = Literal["ok", "refused", "unknown"]
"""ok: Rolecast took it. refused: it said no, for good. unknown: no answer, or one that says "later" (503)."""

HTTP_SECONDS = 30.0
"""How long an answer over HTTP is waited for."""


@dataclass(frozen=True, slots=True)
class Intent:
    """An event that is to be published, and the name of the audience that should get it."""

    event: dict[str, Any]
    audience: str


@dataclass(frozen=True, slots=True)
class Told:
    """What a publisher was told: the answer, Rolecast's id of the event, the exit code or HTTP status, the words."""

    answer: Answer
    ulid: str | None = None
    code: int = 0
    said: str = ""


class Witness:
    """The file of one run. Every method may be called from several threads: a line is one write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def audience(self, name: str, recipients: Sequence[str]) -> str:
        """Name a set of addresses, so that an intent need not repeat it; returns the name."""
        self._write("audience", name=name, recipients=list(recipients))
        return name

    def fault(self, name: str, **facts: Any) -> int:
        """Something is done to the installation now; returns the time, microseconds since 1970."""
        return self._write("fault", name=name, **facts)

    def intend(self, intents: Sequence[Intent]) -> None:
        """Write down, durably, what is about to be published."""
        for one in intents:
            event = one.event
            self._write("intent", source=event["source"], id=event["id"], type=event["type"], audience=one.audience)
        os.fsync(self._file)

    def learn(self, intents: Sequence[Intent], told: Sequence[Told]) -> None:
        """Write down what became of the calls."""
        for one, answer in zip(intents, told, strict=True):
            event = one.event
            self._write("outcome", source=event["source"], id=event["id"], outcome=answer.answer, event=answer.ulid,
                        code=answer.code, said=answer.said)  # fmt: skip

    @contextmanager
    def _told(self, intents: Sequence[Intent]) -> Iterator[list[Told]]:
        """Intent before, outcome after; where the body is left by an error, the outcome is unknown."""
        self.intend(intents)
        answers: list[Told] = []
        try:
            yield answers
        finally:
            self.learn(intents, answers if len(answers) == len(intents) else [Told("unknown")] * len(intents))

    # ---------------------------------------------------------------- publishing

    def publish_cli(
        self, stage: Stage, intents: Sequence[Intent], *, meanwhile: Callable[[], None] | None = None
    ) -> list[Told]:
        """Publish with one `rolecast publish`; `meanwhile` is called once it runs. Codes 2 to 5 are refusals."""
        document = stage.folder / f"publish-{time.time_ns()}.json"
        document.write_text(json.dumps([one.event for one in intents]), encoding="utf-8")
        with self._told(intents) as answers:
            process = stage.start("publish", str(document), "--json", errors=stage.folder / "publish.log")
            if meanwhile is not None:
                meanwhile()
            output, _ = process.communicate()
            document.unlink()
            code = process.returncode
            if code == 0:
                receipts = json.loads(output)["receipts"]
                answers.extend(Told("ok", receipt["event"], code) for receipt in receipts)
            else:
                answers.extend([Told("refused" if 2 <= code <= 5 else "unknown", None, code)] * len(intents))
        return list(answers)

    def publish_http(self, port: int, key: str, intent: Intent, *, seconds: float = HTTP_SECONDS) -> Told:
        """Publish one event over HTTP, once; 202 is ok, 4xx (but 429) a refusal, all else unknown."""
        with self._told([intent]) as answers:
            answers.append(_post(port, key, intent.event, seconds=seconds))
        return answers[0]

    def publish_http_until_told(
        self, port: int, key: str, intent: Intent, *, seconds: float = 60.0, pause: float = 0.1
    ) -> Told:
        """The same, tried again (the same source and id) until it is ok or refused, or `seconds` are over."""
        ends = time.monotonic() + seconds
        while True:
            told = self.publish_http(port, key, intent)
            if told.answer != "unknown" or time.monotonic() > ends:
                return told
            time.sleep(pause)

    def _write(self, what: str, **facts: Any) -> int:
        at = time.time_ns() // 1000
        line = json.dumps({"at": at, "what": what, **facts}) + "\n"
        os.write(self._file, line.encode())
        return at


def _post(port: int, key: str, event: dict[str, Any], *, seconds: float) -> Told:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/events",
        data=json.dumps(event).encode(),
        headers={"Content-Type": "application/cloudevents+json", "Authorization": f"Bearer {key}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=seconds) as response:
            said = json.loads(response.read())
            return Told("ok", said["event"], response.status)
    except urllib.error.HTTPError as error:
        with error:
            words = error.read(2000).decode(errors="replace")
        refused = error.code // 100 == 4 and error.code != 429
        return Told("refused" if refused else "unknown", None, error.code, words)
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:  # none in time, or half an answer
        return Told("unknown", None, 0, str(error))
