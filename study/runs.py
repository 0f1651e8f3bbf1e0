"""The study: its runs, the most telling first; what is done is not done again."""

from __future__ import annotations

import time
from collections.abc import Collection

from ..configs.studying import StudyConfig
from .jobs import make_jobs
from .log import duration, expected
from .plan import Run
from .planner import make_plan
from .report import write_report
from .work import is_done


def study(config: StudyConfig) -> None:
    """Do what is not done yet and write the report of what is.

    A run that fails does not keep the rest from going on, but for those that need it.

    Raises:
        ValueError: for a pattern that names no run; at the end, if runs failed, with their reasons.
        KeyboardInterrupt: after Ctrl-C or SIGTERM; run the same command again to go on.
    """
    plan = make_plan(config)
    runs = plan.chosen(config.only)
    todo = plan.missing(config.only, is_done)
    done = {run.name for run in runs} - {run.name for run in todo}
    began = time.monotonic()
    failures: dict[str, str] = {}
    print(f"{len(runs)} runs, {len(done)} of them done; about {duration(expected(config.output, todo))} to go.")
    jobs = make_jobs(config.output, config.jobs)
    try:
        while todo or jobs.running():
            late = config.hours is not None and time.monotonic() - began >= config.hours * 3600
            while not late and jobs.free() and (run := _ready(todo, done)):
                left = duration(expected(config.output, todo))
                todo.remove(run)
                about = duration(expected(config.output, [run]))
                print(f"\n[{len(runs) - len(todo)}/{len(runs)}] {run.name}: about {about}; {left} to go", flush=True)
                jobs.start(run)
            if not jobs.running():
                break
            run, error = jobs.next()
            if error:
                failures[run.name] = error
                todo = _without_what_needs(run.name, todo, failures)
                print(f"{run.name} failed: {error}", flush=True)
            else:
                done.add(run.name)
    finally:
        jobs.stop()
    if todo:
        print(f"stopped after hours={config.hours:g}, {len(todo)} runs to go; run the same command again to go on.")
    print(f"\nreport: {write_report(config, plan)}")
    if failures:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in failures.items())
        raise ValueError(f"{len(failures)} of {len(runs)} runs failed:\n{reasons}")


def _ready(todo: list[Run], done: Collection[str]) -> Run | None:
    """The first run that has all it needs."""
    return next((run for run in todo if all(name in done for name in run.needs)), None)


def _without_what_needs(name: str, todo: list[Run], failures: dict[str, str]) -> list[Run]:
    """The runs that do not need the one of this name, nor what needs it; the others go to the failures."""
    lost, kept = {name}, []
    for run in todo:  # what a run needs lies before it
        if missing := next((one for one in run.needs if one in lost), None):
            failures[run.name] = f"needs {missing}"
            lost.add(run.name)
        else:
            kept.append(run)
    return kept


def listing(config: StudyConfig) -> str:
    """The runs with what they need and cost, for people."""
    plan = make_plan(config)
    runs, todo = plan.chosen(config.only), plan.missing(config.only, is_done)
    width = max(len(run.name) for run in runs)
    lines = [_line(config, run, run in todo, width) for run in runs]
    total = duration(expected(config.output, todo))
    return "\n".join([*lines, f"{len(runs)} runs, {len(todo)} of them to do; about {total} to go."])


def _line(config: StudyConfig, run: Run, to_do: bool, width: int) -> str:
    state = duration(expected(config.output, [run])) if to_do else "done" if is_done(run) else "not needed"
    needs = f"  needs {', '.join(run.needs)}" if run.needs else ""
    return f"{run.name:<{width}}  {run.kind:<8}  {state:>10}{needs}"
