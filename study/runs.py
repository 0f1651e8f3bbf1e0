"""The study: its runs, the most telling first; what is done is not done again."""

from __future__ import annotations

import time
from collections.abc import Collection, Sized
from contextlib import nullcontext

import yaml

from ..configs.studying import StudyConfig
from ..trf.sole import sole
from .jobs import make_jobs
from .log import duration, expected
from .plan import Plan, Run
from .planner import make_plan
from .report import write_report
from .work import done_in

SETTINGS_FILE = "study.yaml"
OF_A_COMMAND = {"only", "jobs", "hours", "report", "dry_run"}
"""Settings that say what one command does, not what the study is."""


def study(config: StudyConfig) -> None:
    """Do what is not done yet and write the report of what is.

    A run that fails does not keep the rest from going on, but for those that need it.

    Raises:
        ValueError: for a pattern that names no run, or if another process is at the study; at the end, if runs failed,
            with their reasons.
        KeyboardInterrupt: after Ctrl-C or SIGTERM; run the same command again to go on.
    """
    plan = make_plan(config)
    runs = plan.chosen(config.only)
    # A report can be written while another process is at the runs.
    with sole(config.output) if config.hours != 0 else nullcontext():
        _do(config, plan, runs)


def _do(config: StudyConfig, plan: Plan, runs: list[Run]) -> None:
    _keep(config)
    done = done_in(config.output, runs)
    todo = plan.missing(config.only, done)
    total, began = len(todo), time.monotonic()
    failures: dict[str, str] = {}
    print(_summary(config, runs, done, todo))
    jobs = make_jobs(config.output, config.jobs)
    try:
        while todo or jobs.running():
            late = config.hours is not None and time.monotonic() - began >= config.hours * 3600
            while not late and jobs.free() and (run := _ready(todo, done)):
                left = duration(expected(config.output, todo, config.jobs))
                todo.remove(run)
                about = duration(expected(config.output, [run]))
                print(f"\n[{total - len(todo)}/{total}] {run.name}: about {about}; {left} to go")
                jobs.start(run)
            if not jobs.running():
                break
            run, error = jobs.next()
            if error:
                failures[run.name] = error
                todo = _without_what_needs(run.name, todo, failures)
                print(f"{run.name} failed: {error}")
            else:
                done.add(run.name)
    finally:
        jobs.stop()
    if todo:
        print(f"stopped after hours={config.hours:g}, {len(todo)} runs to go; run the same command again to go on.")
    print(f"\nreport: {write_report(config, plan)}")
    if failures:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in failures.items())
        raise ValueError(f"{len(failures)} of {total} runs failed:\n{reasons}")


def _keep(config: StudyConfig) -> None:
    """Write what the study is into its folder, loadable as a CONFIG again."""
    values = yaml.safe_dump(config.model_dump(mode="json", exclude=OF_A_COMMAND), sort_keys=False, allow_unicode=True)
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / SETTINGS_FILE).write_text(f"# trfpp study\n{values}", encoding="utf-8")


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
    runs = plan.chosen(config.only)
    done = done_in(config.output, runs)
    todo = plan.missing(config.only, done)
    states = dict.fromkeys(done, "done") | {run.name: duration(expected(config.output, [run])) for run in todo}
    width = max(len(run.name) for run in runs)
    lines = [_line(run, states.get(run.name, "not needed"), width) for run in runs]
    return "\n".join([*lines, _summary(config, runs, done, todo)])


def _summary(config: StudyConfig, runs: Sized, done: Sized, todo: Collection[Run]) -> str:
    """The rest of the runs is not needed: what was made of them is done."""
    about = duration(expected(config.output, todo, config.jobs))
    return f"{len(runs)} runs, {len(done)} of them done, {len(todo)} to do; about {about} to go."


def _line(run: Run, state: str, width: int) -> str:
    needs = f"  needs {', '.join(run.needs)}" if run.needs else ""
    return f"{run.name:<{width}}  {run.kind:<8}  {state:>10}{needs}"
