"""The study: its runs one after another, the most telling first; what is done is not done again."""

from __future__ import annotations

import time
from collections.abc import Collection

from ..configs.studying import StudyConfig
from ..train.loop import Stopped
from ..train.stage import StageStopped
from .log import add_line, duration, expected
from .plan import Run
from .planner import make_plan
from .report import write_report
from .work import is_done, perform


def study(config: StudyConfig) -> None:
    """Do what is not done yet and write the report of what is.

    A run that fails does not keep the rest from going on, but for those that need it.

    Raises:
        ValueError: for a pattern that names no run; at the end, if runs failed, with their reasons.
        KeyboardInterrupt: after Ctrl-C or SIGTERM; run the same command again to go on.
    """
    plan = make_plan(config)
    runs = plan.chosen(config.only)
    todo = [run for run in runs if not is_done(run)]
    done = {run.name for run in runs} - {run.name for run in todo}
    began = time.monotonic()
    failures: dict[str, str] = {}
    print(f"{len(runs)} runs, {len(done)} of them done; about {duration(expected(config.output, todo))} to go.")
    while todo:
        if config.hours is not None and time.monotonic() - began >= config.hours * 3600:
            print(f"stopped after hours={config.hours:g}, {len(todo)} runs to go; run the same command again to go on.")
            break
        left = duration(expected(config.output, todo))
        run = todo.pop(0)
        if missing := [name for name in run.needs if name not in done]:
            failures[run.name] = f"needs {missing[0]}"
            continue
        about = duration(expected(config.output, [run]))
        print(f"\n[{len(runs) - len(todo)}/{len(runs)}] {run.name}: about {about}; {left} to go", flush=True)
        if error := _attempt(config, run):
            failures[run.name] = error
            print(f"{run.name} failed: {error}", flush=True)
        else:
            done.add(run.name)
    print(f"\nreport: {write_report(config, plan)}")
    if failures:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in failures.items())
        raise ValueError(f"{len(failures)} of {len(runs)} runs failed:\n{reasons}")


def _attempt(config: StudyConfig, run: Run) -> str | None:
    """Do a run and write down how it went; gives the reason if it failed."""
    began, error = time.perf_counter(), None
    try:
        perform(run)
    except (Stopped, StageStopped) as stopped:  # asked to stop, with a checkpoint saved
        raise KeyboardInterrupt(stopped.number) from None
    except Exception as failure:  # of whatever kind: a night's other runs are not to wait for it
        error = f"{type(failure).__name__}: {failure}" if not isinstance(failure, ValueError) else str(failure)
    add_line(config.output, run, time.perf_counter() - began, error)
    return error


def listing(config: StudyConfig) -> str:
    """The runs with what they need and cost, for people."""
    runs = make_plan(config).chosen(config.only)
    ready = {run.name: is_done(run) for run in runs}
    width = max(len(run.name) for run in runs)
    lines = [_line(config, run, ready[run.name], width) for run in runs]
    todo: Collection[Run] = [run for run in runs if not ready[run.name]]
    total = duration(expected(config.output, todo))
    return "\n".join([*lines, f"{len(runs)} runs, {len(runs) - len(todo)} of them done; about {total} to go."])


def _line(config: StudyConfig, run: Run, ready: bool, width: int) -> str:
    state = "done" if ready else duration(expected(config.output, [run]))
    needs = f"  needs {', '.join(run.needs)}" if run.needs else ""
    return f"{run.name:<{width}}  {run.kind:<8}  {state:>7}{needs}"
