"""The benchmark's own arithmetic: what it makes of what it has measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from tests.bench import chart, figures, machine, table
from tests.bench.__main__ import verdict
from tests.bench.goals import Goal, Results, judge
from tests.bench.installation import Run
from tests.bench.latency import Latency
from tests.bench.throughput import Throughput

RUN = Run(
    name="redis",
    recipients=10_000,
    seconds=0.5,
    accepted=10_000,
    distinct=10_000,
    ledger=10_000,
    cpu={"workers": 0.4, "queue": 0.1, "publisher": 0.5},
    started_cpu=0.5,
    peak_mb=90.0,
    peak_sum_mb=400.0,
    bytes_a_mail=7_000.0,
    sink_cpu=0.1,
)
MACHINE = {
    "date": "2026-11-22T00:00:00Z",
    "cores": 2,
    "processor": "one",
    "python": "3.11",
    "commit": "",
    "load_before": 0.1,
}


def throughput(*runs: Run) -> Throughput:
    found = Throughput()
    for run in runs:
        found.add(run)
    return found


def of(goals: list[Goal], key: str) -> list[Goal]:
    return [goal for goal in goals if goal.key == key]


def test_a_spread_is_the_distance_of_the_extremes_as_a_share_of_the_median() -> None:
    assert figures.median([3, 1, 2]) == 2
    assert figures.spread([90, 100, 120]) == pytest.approx(0.3)


@pytest.mark.parametrize(("share", "value"), [(0.5, 50), (0.9, 90), (0.99, 99), (1.0, 100), (0.001, 1)])
def test_a_percentile_is_one_of_the_values(share: float, value: int) -> None:
    assert figures.percentile(list(range(100, 0, -1)), share) == value
    assert figures.percentile([7.0], share) == 7.0


def test_a_ratio_to_what_was_not_measured_is_unknown() -> None:
    assert figures.ratio(6, 3) == 2
    assert figures.ratio(None, 3) is None
    assert figures.ratio(6, None) is None
    assert figures.ratio(6, 0.0) is None


BUSY = "import time; e = time.process_time() + 0.3\nwhile time.process_time() < e: pass\n"
PARENT = (
    f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BUSY!r}]); print(1, flush=True); sys.stdin.read()"
)


def test_the_processor_time_of_a_tree_has_its_children_in_it_even_after_their_end() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert 0.28 <= machine.cpu_seconds(process.pid) < 3
        assert process.pid in machine.family(os.getpid())
        assert machine.cpu_seconds(process.pid, process.pid) == pytest.approx(machine.cpu_seconds(process.pid))
        assert machine.peaks_mb(process.pid)[0] > 3
        process.communicate("")
    assert machine.cpu_seconds(process.pid) == 0.0


def test_the_publishers_start_is_told_apart_from_what_mails_cost() -> None:
    assert RUN.rate == 20_000
    assert RUN.cpu_of_1000 == pytest.approx(0.1)
    assert RUN.running_cpu_of_1000 == pytest.approx(0.05)


def test_medians_are_taken_of_the_largest_size_unless_one_is_named() -> None:
    found = throughput(
        RUN, replace(RUN, seconds=1.0), replace(RUN, seconds=2.0), replace(RUN, recipients=100, seconds=1)
    )
    assert found.median("redis", lambda run: run.rate) == 10_000
    assert found.median("redis", lambda run: run.rate, 100) == 100
    assert found.median("nobody", lambda run: run.rate) is None
    assert found.sizes("redis") == [100, 10_000]


def test_every_goal_is_a_line_even_where_nothing_was_measured() -> None:
    goals = judge(Results())
    assert {goal.key for goal in goals} >= {"G1", "G2", "G3", "G4", "G5", "G7", "G8", "G9", "G10", "G11"}
    assert all(goal.reached is None for goal in goals)


def test_goals_are_ratios_of_medians() -> None:
    large, source = replace(RUN, recipients=200_000, seconds=10.0), replace(RUN, name="smtp_source", recipients=200_000)
    goals = judge(Results(throughput(large, replace(source, seconds=8.0), RUN)))
    assert [goal.measured for goal in of(goals, "G1")] == [pytest.approx(0.8), None]
    assert of(goals, "G1")[0].reached is False
    memory = [goal for goal in of(goals, "G6") if goal.unit == "MB"]
    assert [(goal.measured, goal.reached) for goal in memory] == [(0.0, True)]


def test_latency_is_judged_by_its_median() -> None:
    seconds = {"floor": [0.001] * 3, "one back to back": [0.002, 0.002, 9.0], "redis idle": [0.07]}
    goals = judge(Results(latency=Latency(seconds, idle_cpu_share=0.01)))
    assert [(goal.measured, goal.reached) for goal in of(goals, "G9")] == [(pytest.approx(2.0), True)]
    assert [(goal.measured, goal.reached) for goal in of(goals, "G10")] == [
        (pytest.approx(70), False),
        (pytest.approx(1), True),
    ]


@pytest.mark.parametrize("wrong", [{"accepted": 9_999}, {"accepted": 10_001}, {"distinct": 9_999}, {"ledger": 9_999}])
def test_a_run_fails_where_sink_ledger_and_recipients_differ(wrong: dict[str, int]) -> None:
    results = Results(throughput(RUN, replace(RUN, **wrong)))  # type: ignore[arg-type]  # all are numbers
    assert verdict(results, judge(results), strict=False) == 1
    assert of(judge(results), "G12")[0].reached is False


def test_a_missed_goal_fails_a_run_only_where_that_is_asked_for() -> None:
    results = Results(throughput(RUN, replace(RUN, name="smtp_source", seconds=0.1, ledger=None)))
    assert of(judge(results), "G1")[0].reached is False
    assert verdict(results, judge(results), strict=False) == 0
    assert verdict(results, judge(results), strict=True) == 1


def test_the_table_names_every_sender_and_fits_a_terminal() -> None:
    results = Results(throughput(RUN, replace(RUN, name="dramatiq", recipients=2_000, ledger=None)))
    results.throughput.not_installed.append("Celery, 2 processes")  # type: ignore[union-attr]  # it is there
    lines = list(table.lines(results, judge(results), MACHINE))
    text = "\n".join(lines)
    assert "Redis, 2 workers, SQLite" in text
    assert "not installed" in text
    assert max(map(len, lines)) <= 110


def test_the_chart_is_drawn_from_the_raw_results_alone() -> None:
    results = Results(throughput(RUN, replace(RUN, name="smtp_source", ledger=None)))
    raw = json.loads(json.dumps(table.as_json(results, judge(results), MACHINE, {})))
    drawn = chart.draw(raw)
    root = ET.fromstring(drawn)
    bars = [part for part in root.iter("{http://www.w3.org/2000/svg}rect") if part.get("class") in {"ours", "bound"}]
    assert len(bars) == 2
    assert "prefers-color-scheme: dark" in drawn
    assert "20,000" in drawn


def test_facts_of_the_machine_say_what_figures_depend_on() -> None:
    facts = machine.facts()
    assert facts["cores"] >= 1
    assert facts["date"] <= time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    assert "dramatiq" in facts["libraries"]
