"""Doing the study: all of the smallest one, again without doing anything, on after a failure, within a budget."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from trfpp.data_prep.dataset import load_clips
from trfpp.study.log import LOG_FILE, add_line, expected, read_log, seconds_taken
from trfpp.study.planner import make_plan
from trfpp.study.runs import listing
from trfpp.study.work import attempt, done_in, perform
from trfpp.train.loop import Stopped
from trfpp.trf.patch import read_card
from trfpp.trf.sole import sole

pytestmark = pytest.mark.slow


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def is_done(config, run):
    return bool(done_in(config.output, [run]))


def die(*_):
    os._exit(7)


def test_the_smallest_study_runs_through(finished):
    plan = make_plan(finished)
    assert {run.kind for run in plan.runs.values()} == {
        "films", "clips", "cache", "told", "train", "full", "evaluate",
    }  # fmt: skip
    assert done_in(finished.output, plan.runs.values()) == plan.runs.keys()
    assert [line["name"] for line in read_log(finished.output)] == list(plan.runs)
    assert read_card(finished.output / "runs" / "loop-pair" / "patch").direction == "both"
    assert len(load_clips(finished.output / "loop" / "clips-2")) == 2
    for name in plan.runs:
        if name.startswith("eval/"):
            summary = json.loads((finished.output / name / "summary.json").read_text())
            assert summary["pairs"] == (1 if "trf++" in name or "vibid" in name else 2)


def test_what_is_done_is_not_done_again(finished, do, capsys):
    files = [file for folder in ("eval", "runs", "loop", "base") for file in (finished.output / folder).rglob("*.*")]
    assert len(files) > 200
    before = {file: file.stat().st_mtime_ns for file in files}
    do(finished)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    runs = len(make_plan(finished).runs)
    assert len(read_log(finished.output)) == runs
    assert f"{runs} runs, {runs} of them done, 0 to do; about 0 s to go" in capsys.readouterr().out
    assert listing(finished).count("  done") == runs


@contextmanager
def restored(file):
    """Whatever is done to a file inside the block is undone after it."""
    kept = file.read_bytes()
    try:
        yield
    finally:
        file.write_bytes(kept)


def test_a_patch_trained_anew_makes_its_evaluation_undone_and_a_deleted_one_does_not(finished):
    run = make_plan(finished).runs["eval/loop-either"]
    patch = finished.output / "runs" / "loop-either" / "patch"
    weights = patch / "adapter_model.safetensors"
    with restored(weights):
        save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
        assert not is_done(finished, run)
        patch.rename(patch.with_name("elsewhere"))
        assert is_done(finished, run)
        patch.with_name("elsewhere").rename(patch)
    assert is_done(finished, run)


def test_an_evaluation_by_other_defaults_of_its_sampler_is_undone(finished):
    run = make_plan(finished).runs["eval/loop-trf++-long"]
    file = finished.output / run.name / "summary.json"
    said = json.loads(file.read_text())
    assert is_done(finished, run)
    with restored(file):
        said["settings"]["sampler.max_guidance_sigma"] = 700.0
        file.write_text(json.dumps(said))
        assert not is_done(finished, run)


def test_settings_that_are_new_since_a_run_do_not_undo_it(finished):
    run = make_plan(finished).runs["eval/loop-base"]
    file = finished.output / run.name / "evaluate.yaml"
    lines = file.read_text().splitlines(keepends=True)
    with restored(file):
        file.write_text("".join(line for line in lines if not line.startswith("fit:")))
        assert is_done(finished, run)
        file.write_text("".join("fit: pad\n" if line.startswith("fit:") else line for line in lines))
        assert not is_done(finished, run)
        file.write_text("".join([*lines, "gone: 1\n"]))
        assert not is_done(finished, run)


def test_a_study_by_another_spelling_is_as_done(finished, settings, monkeypatch):
    monkeypatch.chdir(finished.output.parent)
    plan = make_plan(settings("smoke", finished.output.name))
    assert done_in(Path(finished.output.name), plan.runs.values()) == plan.runs.keys()


def test_what_rests_on_other_settings_is_neither_done_nor_taken_for_done(finished, settings):
    """The pair that is trained longer has its own settings still, but those of the pair it started from are others."""
    runs = make_plan(settings("smoke", finished.output, "patch.optim.lr=2e-2")).runs
    done = done_in(finished.output, runs.values())
    assert {"loop/clips", "eval/loop-base", "eval/loop-full"} <= done
    assert not {"runs/loop-pair", "eval/loop-pair", "runs/loop-long", "eval/loop-long"} & done
    lines = read_log(finished.output)
    runs = make_plan(settings("smoke", finished.output, "train_films=4")).runs
    with pytest.raises(ValueError, match=r"output=.*: runs/loop-full there rests on other settings; move it away"):
        perform(finished.output, runs["runs/loop-full"])
    assert attempt(finished.output, runs["runs/loop-full"]).startswith("output=")
    assert read_log(finished.output)[len(lines) :][0]["error"].startswith("output=")
    (finished.output / LOG_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_films_caches_and_trainings_may_be_deleted(finished, tmp_path):
    plan = make_plan(finished)
    folders = [finished.output / name for name in ("loop", "base", "runs")]
    for folder in folders:
        folder.rename(tmp_path / folder.name)
    try:
        done = done_in(finished.output, plan.runs.values())
        assert done == {name for name in plan.runs if name.startswith("eval/")}
        assert plan.missing((), done) == []
    finally:
        for folder in folders:
            (tmp_path / folder.name).rename(folder)


def test_a_failing_run_is_reported_and_the_rest_goes_on(settings, do, tmp_path):
    """Something else lies where the films to train on should be."""
    output = tmp_path / "out"
    only = "only=[eval/loop-base,eval/loop-pair,eval/loop-cross_fade]"
    config = settings("smoke", output, only)
    (output / "loop" / "train").mkdir(parents=True)
    (output / "loop" / "train" / "mine.txt").write_text("not a film")
    with pytest.raises(ValueError, match=r"5 of 9 runs failed:\n  loop/train: output=.*something else, are there"):
        do(config)
    assert json.loads((output / "eval" / "loop-base" / "summary.json").read_text())["pairs"] == 2
    assert (output / "eval" / "loop-cross_fade" / "summary.json").is_file()
    assert not (output / "eval" / "loop-pair").exists()
    report = (output / "report" / "report.md").read_text()
    assert "`loop/train` failed: output=" in report
    (output / "loop" / "train" / "mine.txt").unlink()
    do(config)  # once the cause is gone, what failed is done
    assert (output / "eval" / "loop-pair" / "summary.json").is_file()
    assert "loop/train` failed" not in (output / "report" / "report.md").read_text()


def test_a_signal_ends_the_study_and_not_a_run(settings, do, tmp_path, monkeypatch):
    def asked_to_stop(output, run):
        raise Stopped(15, tmp_path)

    monkeypatch.setattr("trfpp.study.work.perform", asked_to_stop)
    with pytest.raises(KeyboardInterrupt) as stopped:
        do(settings("smoke", tmp_path / "out"))
    assert stopped.value.args == (15,)
    (line,) = read_log(tmp_path / "out")  # its time counts, though it is neither done nor failed
    assert line.keys() == {"name", "kind", "seconds", "expected"}


def test_a_study_has_one_process_and_any_may_report(settings, do, tmp_path):
    with sole(tmp_path / "out"):
        with pytest.raises(ValueError, match="another process is at it"):
            do(settings("smoke", tmp_path / "out"))
        do(settings("smoke", tmp_path / "out", "hours=0"))
    assert (tmp_path / "out" / "report" / "report.md").is_file()


def test_a_line_cut_off_by_a_full_disk_is_left_out(finished, tmp_path):
    one, other = list(make_plan(finished).runs.values())[:2]
    add_line(tmp_path, one, 1.0)
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write('{"name": "runs/li')
    assert [line["name"] for line in read_log(tmp_path)] == [one.name]
    add_line(tmp_path, other, 2.0)
    assert [line["name"] for line in read_log(tmp_path)] == [one.name, other.name]


def test_jobs_share_the_time_but_for_the_longest_run(finished, tmp_path):
    run = next(iter(make_plan(finished).runs.values()))
    runs = [replace(run, seconds=seconds) for seconds in (10.0, 20.0, 60.0)]
    assert [expected(tmp_path, runs, jobs) for jobs in (1, 2)] == [90.0, 60.0]
    assert expected(tmp_path, runs[:2], 2) == 20.0
    assert expected(tmp_path, [*runs, runs[2]], 2) == 75.0
    assert expected(tmp_path, [], 2) == 0.0


def test_all_goes_of_a_run_count(finished, tmp_path):
    """As when it was interrupted, or when all that was left to do was its summary."""
    runs = list(make_plan(finished).runs.values())
    one, other = [replace(run, seconds=10.0) for run in runs if run.kind == "evaluate"][:2]
    for seconds, became in ((30.0, {}), (20.0, {"digest": one.digest}), (0.5, {"digest": one.digest})):
        add_line(tmp_path, one, seconds, **became)
    add_line(tmp_path, other, 5.0, error="no room")
    assert seconds_taken(tmp_path) == {one.name: 50.5, other.name: 5.0}
    assert expected(tmp_path, [other]) == pytest.approx(50.5)
    add_line(tmp_path, one, 7.0, digest="of other settings")
    assert seconds_taken(tmp_path)[one.name] == 7.0


def test_two_at_once_do_what_one_after_another_does(settings, do, finished, tmp_path):
    names = ("eval/loop-base", "eval/loop-cross_fade")
    config = settings("smoke", tmp_path / "out", "jobs=2", f"only=[{','.join(names)}]")
    do(config)
    assert {line["name"] for line in read_log(config.output)} == {"loop/held", "loop/pairs", *names}
    for name in names:
        alone, beside = (read_lines(one.output / name / "metrics.jsonl") for one in (finished, config))
        assert [line["inner_psnr"] for line in beside] == pytest.approx(
            [line["inner_psnr"] for line in alone], abs=0.05
        )
    assert "2 pairs" in (config.output / "jobs" / "eval-loop-base.txt").read_text()


def test_a_process_of_its_own_imports_nothing_that_speaks_before_its_file_is_open():
    code = """
import logging, sys
import trfpp.study.apart, trfpp.study.told, trfpp.configs.training
print({"torch", "bitsandbytes"} & {*sys.modules})
trfpp.study.apart.hush_libraries()
import bitsandbytes, datasets, diffusers, huggingface_hub, transformers
print({name for name in ("bitsandbytes", "datasets", "diffusers", "huggingface_hub", "transformers")
       if logging.getLogger(name).getEffectiveLevel() < logging.ERROR})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["set()", "set()"]
    assert "Failed" not in done.stderr


def test_a_process_whose_imports_fail_says_so_in_its_file(tmp_path):
    code = """
import sys
from pathlib import Path
from trfpp.study.apart import apart
from trfpp.study.plan import Run
sys.modules["torch"] = None  # as where it is not installed
run = Run(name="a/b", kind="films", settings=None, digest="", seconds=1.0)
apart(Path(sys.argv[1]), run, 1, None)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ModuleNotFoundError" in (tmp_path / "jobs" / "a-b.txt").read_text()


def test_a_process_that_dies_fails_its_run_alone(settings, do, tmp_path, monkeypatch):
    monkeypatch.setattr("trfpp.study.jobs.apart", die)
    with pytest.raises(ValueError, match=r"loop/held: its process ended with status 7; see .*loop-held.txt"):
        do(settings("smoke", tmp_path / "out", "jobs=2", "only=[loop/held,loop/train]"))
    assert [line["error"][:32] for line in read_log(tmp_path / "out")] == ["its process ended with status 7;"] * 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_what_runs_at_once_saves_and_stops_with_the_study(tiny_model, finished, tmp_path, number):
    """Ctrl-C goes to the whole group, as a terminal sends it; a killed study has no time to ask."""
    output = tmp_path / "out"
    shutil.copytree(finished.output / "loop", output / "loop")  # films, clips and their cache: only trainings are left
    words = [
        f"output={output}",
        f"model={tiny_model}",
        "jobs=2",
        "patch.steps=5000",
        "only=[runs/*-pair,runs/*-either]",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "trfpp", "study", "smoke", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    jobs = [output / "jobs" / f"runs-loop-{name}.txt" for name in ("pair", "either")]
    try:
        end = time.monotonic() + 400
        while not all(file.is_file() and "step 25" in file.read_text() for file in jobs):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.2)
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        _, said = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in said
    _, left = psutil.wait_procs(children, timeout=60)
    assert all(child.status() == psutil.STATUS_ZOMBIE for child in left)
    assert all(list((output / "runs" / f"loop-{name}" / "checkpoints").iterdir()) for name in ("pair", "either"))


def test_no_run_starts_after_the_budget(settings, do, tmp_path, capsys):
    config = settings("smoke", tmp_path / "out", "hours=0")
    do(config)
    assert "runs to go; run the same command again to go on." in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report", "study.yaml"}


def test_the_list_says_what_runs_need_and_cost(settings, tmp_path):
    text = listing(settings("full", tmp_path / "out"))
    line = next(line for line in text.splitlines() if line.startswith("eval/views-pair "))
    assert line.endswith("needs views/pairs, runs/views-pair, views/held")
    assert " min " in line
    assert re.search(r"(\d+) runs, 0 of them done, \1 to do; about ", text)
    assert not (tmp_path / "out").exists()
