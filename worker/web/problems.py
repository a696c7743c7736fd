"""Errors of the web side: problem details (RFC 9457) for programs, a plain page for people.

A problem says in `errors` what is wrong where, each with a JSON pointer (RFC 6901) into the body. Nothing of the
inside leaves the house: an error that nobody expected is logged, and answered with one sentence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from subscriptions.database import DatabaseUnusable
from worker import logs
from worker.events import EventError
from worker.intake import Refused
from worker.web.site import Site

logger = logs.get(__name__)

RETRY_SECONDS: Final = 5
#: When a publisher should come again after the database could not be used.

_FOR_PROGRAMS: Final = ("/v1/", "/healthz", "/readyz", "/metrics", "/openapi.json")

_STATUS_OF_KIND: Final = {"unsupported": 415, "too_large": 413, "malformed": 400, "invalid": 422, "conflict": 409}
#: By the order in which they count where one request has several (contract, section 7).

_DETAILS: Final = {
    404: "There is nothing at this address.",
    405: "This address does not take that method.",
}


class Problem(Exception):  # noqa: N818 - RFC 9457's own word
    """A request that can't be answered as asked: the status, one sentence, and a pointer for each fault."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        errors: Iterable[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.errors = tuple(errors)
        self.headers = dict(headers or {})

    def response(self) -> JSONResponse:
        """The problem as `application/problem+json`."""
        body: dict[str, Any] = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
        }
        if self.errors:
            body["errors"] = [{"pointer": pointer, "detail": detail} for pointer, detail in self.errors]
        return JSONResponse(body, self.status, self.headers, media_type="application/problem+json")


def of_events(error: EventError) -> Problem:
    """The problem of events that can't be read: 415 before 413 before 400 before 422."""
    return _of_faults([(fault.kind, fault.pointer, fault.message) for fault in error.faults])


def of_refusal(error: Refused, *, batch: bool) -> Problem:
    """The problem of events that the intake refused: 422 before 409; in a batch pointers begin with the index."""
    return _of_faults(
        [
            (fault.kind, f"/{fault.index}{fault.pointer}" if batch else fault.pointer, _sentence(fault.message))
            for fault in error.faults
        ]
    )


def _of_faults(faults: list[tuple[str, str, str]]) -> Problem:
    kinds = {kind for kind, _, _ in faults}
    kind = next(kind for kind in _STATUS_OF_KIND if kind in kinds)
    first = next(message for fault_kind, _, message in faults if fault_kind == kind)
    errors = [(pointer, message) for _, pointer, message in faults]
    return Problem(_STATUS_OF_KIND[kind], first, errors=errors)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?", "!")) else ".")


def install(api: FastAPI, site: Site) -> None:
    """Answer every error of the web side in its form."""

    async def told(request: Request, problem: Problem) -> Response:
        if request.url.path.startswith(_FOR_PROGRAMS):
            return problem.response()
        page = await run_in_threadpool(
            site.personal, "problem", status=problem.status, not_found=problem.status == 404, detail=problem.detail
        )
        page.headers.update(problem.headers)
        return page

    async def on_problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        return await told(request, error)

    async def on_database(request: Request, error: Exception) -> Response:
        logger.error("database.unusable", error=str(error), what_next="callers are asked to try again")
        detail = "The database can't be used at the moment; nothing was stored. Try again in a few seconds."
        return await told(request, Problem(503, detail, headers={"Retry-After": str(RETRY_SECONDS)}))

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        detail = _DETAILS.get(error.status_code, str(error.detail))
        return await told(request, Problem(error.status_code, detail, headers=error.headers))

    async def on_parameters(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        faults = [(str(fault["loc"][-1]), str(fault["msg"])) for fault in error.errors()]
        detail = "; ".join(f"The parameter {name!r}: {message}" for name, message in faults)
        return await told(request, Problem(422, _sentence(detail)))

    async def on_anything(request: Request, _error: Exception) -> Response:
        return await told(request, Problem(500, "Something went wrong here; it was written to the log."))

    api.add_exception_handler(Problem, on_problem)
    api.add_exception_handler(DatabaseUnusable, on_database)
    api.add_exception_handler(HTTPException, on_http)
    api.add_exception_handler(RequestValidationError, on_parameters)
    api.add_exception_handler(Exception, on_anything)
