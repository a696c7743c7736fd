"""What the machine says: processor time and memory of whole process trees, and the facts that figures depend on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

TICKS = os.sysconf("SC_CLK_TCK")
LIBRARIES = ("aiosmtplib", "celery", "django-post-office", "dramatiq", "jinja2", "psycopg", "sqlalchemy", "uvloop")


def family(pid: int) -> list[int]:
    """A process and everything below it that lives now."""
    found, look = [], [pid]
    while look:
        one = look.pop()
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                look += [int(word) for word in (task / "children").read_text().split()]
            found.append(one)
    return found


def cpu_seconds(*roots: int) -> float:
    """Processor seconds of these processes and all below them, ended children that were waited for included."""
    ticks = 0
    for pid in {one for root in roots for one in family(root)}:
        with contextlib.suppress(OSError):
            # The name of a program may hold blanks and brackets: what is counted stands behind the last bracket.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(int(field) for field in fields[11:15])  # utime, stime, cutime, cstime
    return ticks / TICKS


def peaks_mb(*roots: int) -> list[float]:
    """The most memory that each of these processes, and of those below, ever had resident; the largest first."""
    found = []
    for pid in {one for root in roots for one in family(root)}:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            found += [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")]
    return sorted(found, reverse=True)


def facts() -> dict[str, Any]:
    """The machine, the versions and the moment."""
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "processor": _processor(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "libraries": versions,
        "commit": _commit(),
        "load_before": os.getloadavg()[0],
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return ""
