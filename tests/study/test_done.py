"""What counts as done: what would be made the same way now, wherever the study's folder lies and whatever is deleted."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from trfpp.configs.load import command_line
from trfpp.configs.schema import WorldsConfig
from trfpp.configs.studying import StudyConfig
from trfpp.study.digest import deciding
from trfpp.study.planner import make_plan
from trfpp.study.results import Results
from trfpp.study.runs import listing, study
from trfpp.study.told import write_told
from trfpp.study.work import done_in

MEASURED = Path(__file__).parents[2] / "docs" / "study" / "measured"


def of_study(output, *words):
    return command_line(StudyConfig, "study", ["full", f"output={output}", *words])


@pytest.fixture
def measured(tmp_path):
    """A copy of what was measured, without films, caches and all trainings but one."""
    copy = Path(shutil.copytree(MEASURED, tmp_path / "copy"))
    for training in (copy / "runs").iterdir():
        if training.name != "linear-pair":
            shutil.rmtree(training)
    return copy


def digests(config):
    return {name: run.digest for name, run in make_plan(config).runs.items()}


def test_what_was_measured_stays_done_elsewhere_and_however_it_is_called(measured, monkeypatch):
    evaluations = {f"eval/{folder.name}" for folder in (MEASURED / "eval").iterdir()}
    monkeypatch.chdir(measured.parent)
    for output in (measured, "copy", "copy/../copy"):
        lines = [line.split() for line in listing(of_study(output)).splitlines()]
        assert {line[0] for line in lines if line[2] == "done" and line[1] == "evaluate"} == evaluations
    assert len(evaluations) >= 14


def test_an_evaluation_is_undone_by_what_it_rests_on(measured):
    """Its own settings say where its patch lies, and not how that was trained."""
    names = ("eval/linear-pair", "eval/linear-long", "eval/linear-base")
    less = ("worlds=[linear]", "longer.worlds=[linear]", "sampling.worlds=[]", "sweeps.worlds=[]")

    def done(*words):
        results = Results(measured, make_plan(of_study(measured, *less, *words)))
        return [results.has(name) for name in names]

    def add(**line):
        with (measured / "study.jsonl").open("a") as file:
            file.write(json.dumps({"kind": "evaluate", "seconds": 1.0, "expected": 1.0, **line}) + "\n")

    (measured / "study.jsonl").unlink()
    assert done("patch.steps=300") == [True, True, True]  # as long as nothing says what they rested on
    for name in names:
        add(name=name, digest=digests(of_study(measured))[name])
    assert done() == done("batch=2", "jobs=2", "sheets=1") == [True, True, True]
    assert done("patch.steps=300") == done("train_films=400") == [False, False, True]
    assert done("longer.steps=300") == [True, False, True]
    assert done("seed=2") == [False, False, False]
    add(name=names[0], error="no room")  # of what failed nothing was made
    assert done("patch.steps=300") == [False, False, True]
    add(name=names[0])
    assert done("patch.steps=300") == [True, False, True]


def test_a_digest_is_of_what_decides_the_results(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    usual = digests(settings("smoke", tmp_path / "out"))

    def changed(*words, output=tmp_path / "out"):
        now = digests(settings("smoke", output, *words))
        return {name for name in usual.keys() & now.keys() if now[name] != usual[name]}

    assert changed(output="out") == changed(output=tmp_path / "elsewhere" / "other") == set()
    (tmp_path / "miniature").mkdir()  # a folder of that name is not the model
    assert changed() == set()
    assert changed("batch=3", "jobs=2", "sheets=0", "hours=1") == set()
    assert changed("seed=5") == changed("num_frames=5") == changed("size=64") == usual.keys()
    of_long = {f"eval/{name}" for name in ("loop-long", "loop-trf++-long", "loop-vibid-long", "base-loop-long")}
    assert changed("longer.steps=7") == {"runs/loop-long", *of_long}
    assert changed("full.steps=7") == {"runs/loop-full", "eval/loop-full"}
    longer = {"runs/loop-pair", "eval/loop-pair", "runs/loop-long", "eval/base-loop", *of_long}
    unpatched = {name for name in usual if name.endswith(("-base", "-ceiling", "-cross_fade", "-flow_warp", "-full"))}
    for word in ("patch.steps=3", "patch.optim.lr=1e-3", "patch.lora.dropout=0.1"):
        assert longer <= changed(word)
        assert not unpatched & changed(word)
    more = changed("train_films=5")
    assert longer | {"runs/loop-full", "eval/loop-full"} <= more
    assert not {"loop/held", "loop/pairs", "eval/loop-base", "eval/base-base"} & more


def test_a_setting_that_is_new_decides_nothing_by_its_default(tmp_path):
    class Later(WorldsConfig):
        grain: float = 0.0

    now = {"world": "loop", "output": tmp_path / "films", "count": 3}
    assert deciding(Later(**now), tmp_path) == deciding(WorldsConfig(**now), tmp_path)
    assert deciding(Later(**now, grain=1.0), tmp_path) != deciding(WorldsConfig(**now), tmp_path)


def test_told_pairs_are_those_of_the_pairs_now(settings, tmp_path):
    run = make_plan(settings("smoke", tmp_path)).runs["loop/told/fps-0.5.jsonl"]
    pair = {"start": "a/start.png", "end": "a/end.png", "truth": "a/truth", "fps": 8.0, "motion_bucket_id": 100.0}
    run.settings.manifest.parent.mkdir(parents=True)
    run.settings.manifest.write_text(json.dumps(pair) + "\n")
    assert not done_in(tmp_path, [run])
    write_told(run.settings)
    assert done_in(tmp_path, [run])
    run.settings.manifest.write_text(json.dumps(pair | {"fps": 6.0}) + "\n")
    assert not done_in(tmp_path, [run])
    write_told(run.settings)
    assert done_in(tmp_path, [run])
    run.settings.manifest.unlink()
    assert not done_in(tmp_path, [run])


def test_what_is_kept_says_what_the_study_is_and_not_what_one_command_did(tmp_path):
    output, of_one = tmp_path / "out", ("hours=0", "jobs=2", f"report={tmp_path / 'report'}")
    with pytest.raises(ValueError, match=r"no run is called 'eval/nothing'"):
        study(of_study(output, *of_one, "only=[eval/nothing]"))
    assert not output.exists()
    study(of_study(output, *of_one, "only=[eval/linear-*]", "seed=3"))
    kept = output / "study.yaml"
    assert command_line(StudyConfig, "study", [str(kept)]) == of_study(output, "seed=3")
    assert not {"only", "hours", "jobs", "report", "dry_run"} & yaml.safe_load(kept.read_text()).keys()


def test_runs_that_nothing_waits_for_are_not_called_done(measured, monkeypatch, capsys):
    """Of these runs all evaluations are done, and all that they were made of is deleted, but for a patch."""
    monkeypatch.setattr("trfpp.study.runs.write_report", lambda *_: "none")
    config = of_study(measured, "only=[eval/linear-base,eval/linear-pair,eval/linear-long]")
    counted = "13 runs, 4 of them done, 0 to do; about 0 s to go."
    text = listing(config)
    assert text.count("  not needed") == 9
    assert text.endswith(counted)
    study(config)
    assert counted in capsys.readouterr().out
