"""The command line: help, recipes, overrides, errors that name the nearest valid key; machine files; the README's words."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import trfpp
from trfpp.__main__ import COMMANDS, main
from trfpp.configs.load import SettingsError, command_line, recipes
from trfpp.configs.pretraining import PretrainConfig
from trfpp.configs.schema import (
    CacheConfig,
    CompareConfig,
    EvaluateConfig,
    ExportConfig,
    FilmConfig,
    InferConfig,
    PrepConfig,
    QuickstartConfig,
    Settings,
    WorldsConfig,
)
from trfpp.configs.studying import StudyConfig
from trfpp.configs.training import TrainConfig

ROOT = Path(trfpp.__file__).parent
MODELS = {
    "prep": PrepConfig,
    "cache": CacheConfig,
    "train": TrainConfig,
    "infer": InferConfig,
    "film": FilmConfig,
    "evaluate": EvaluateConfig,
    "compare": CompareConfig,
    "export": ExportConfig,
    "worlds": WorldsConfig,
    "quickstart": QuickstartConfig,
    "pretrain": PretrainConfig,
    "study": StudyConfig,
}
NEEDED = {
    "prep": ["source=s", "output=o"],
    "train": ["model=m", "data=d", "output=o"],
    "infer": ["output=o", "loop=i.png"],
    "film": ["output=o", "keyframes=[i.png,j.png]", "times=[0,9]"],
    "worlds": ["world=linear", "output=o"],
    "pretrain": ["output=o"],
    "study": ["output=o"],
}


def parse(command, *words):
    return command_line(MODELS[command], command, words)


def fields(model, prefix=""):
    for name, field in model.model_fields.items():
        yield prefix + name, field
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield from fields(field.annotation, f"{prefix}{name}.")


def run(*words):
    return subprocess.run([sys.executable, "-m", "trfpp", *words], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("words", [["--help"], *([command, "--help"] for command in MODELS)])
def test_help_is_quick_and_imports_nothing_heavy(words):
    program = (
        "import sys; from trfpp.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'torch', 'diffusers', 'datasets', 'numpy', 'cv2', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage: trfpp" in done.stdout


@pytest.mark.parametrize("command", MODELS)
def test_help_explains_every_setting(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parse(command, "--help")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, field in fields(MODELS[command]):
        assert field.description, name
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, Settings)):
            assert f"--{name}" in text or f"--{name.replace('_', '-')}" in text, name
            assert " ".join(field.description.split()[:3]) in text


def test_every_command_is_listed():
    assert set(COMMANDS) == set(MODELS)


@pytest.mark.parametrize(
    ("command", "name"), [(c, n) for c in ("prep", "train", "infer", "worlds") for n in recipes(c)]
)
def test_every_shipped_recipe_is_valid(command, name):
    settings = parse(command, name, *NEEDED[command])
    said = yaml.safe_load(recipes(command)[name].read_text())
    assert set(said) <= set(settings.model_dump())
    assert recipes(command)[name].read_text().startswith("# ")


def test_overrides_in_both_spellings_go_over_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d\nlora: {rank: 4}\noptim: {lr: 1e-3, betas: [0.1, 0.2]}\n")
    settings = parse(
        "train", str(file), "output=o", "lora.rank=8", "--optim.name", "adamw8bit", "optim.betas=[0.3,0.4]"
    )
    assert (settings.lora.rank, settings.optim.lr, settings.optim.name) == (8, 1e-3, "adamw8bit")
    assert settings.optim.betas == (0.3, 0.4)
    assert settings.data == Path("d")
    assert parse("train", "model=m", "data=a=b", "output=o").data == Path("a=b")
    assert parse("train", "model=m", "data=d", "output=o", "optim.max_grad_norm=null").optim.max_grad_norm is None
    assert parse("train", "model=m", "data=d", "output=o", "objective.sigma_mean=-1").objective.sigma_mean == -1
    assert parse("train", "model=m", "data=d", "output=o", "domain=true").domain == "true"
    file.write_text("model: m\ndata: d\noutput: o\nprecision: no\n")  # which YAML 1.1 calls false
    assert parse("train", str(file)).precision == parse("train", str(file), "precision=no").precision == "no"


@pytest.mark.parametrize(
    ("words", "dry_run", "rslora"),
    [
        (["--dry-run"], True, False),
        (["dry_run=true", "lora.rslora=true"], True, True),
        (["--dry_run", "--lora.rslora"], True, True),
        (["dry_run=false", "--lora.no-rslora"], False, False),
    ],
)
def test_switches(words, dry_run, rslora):
    settings = parse("train", "model=m", "data=d", "output=o", *words)
    assert (settings.dry_run, settings.lora.rslora) == (dry_run, rslora)


def test_a_switch_set_in_the_file_can_be_taken_back(tmp_path):
    (tmp_path / "run.yaml").write_text("lora: {rslora: true}\n")
    assert not parse(
        "train", str(tmp_path / "run.yaml"), "model=m", "data=d", "output=o", "lora.rslora=false"
    ).lora.rslora


def test_resolved_settings_are_a_config_again(tmp_path):
    settings = parse("train", "svd_xt", "model=m", "data=d", "output=o", "optim.lr=3e-5")
    (tmp_path / "again.yaml").write_text(settings.as_yaml())
    assert parse("train", str(tmp_path / "again.yaml")) == settings


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("optim: {lrr: 1}", "unknown setting 'optim.lrr'; did you mean 'optim.lr'?"),
        ("rank: 4", "unknown setting 'rank'; did you mean 'lora.rank'?"),
        ("stepz: 4", "unknown setting 'stepz'; did you mean 'steps'?"),
        ("steps: 1.5", "steps=1.5: Input should be a valid integer"),
        ("steps: '5'", "steps='5': Input should be a valid integer"),
        ("optim: {lr: fast}", "optim.lr='fast': Input should be a valid number"),
        ("optim: 3", "optim=3"),
        ("[1, 2]", "must hold `key: value` lines"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_bad_file_is_refused_in_a_sentence(content, said, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(SettingsError) as error:
        parse("train", str(file), "model=m", "data=d", "output=o")
    assert said in str(error.value)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.lrr=1"], "unknown setting 'optim.lrr'; did you mean 'optim.lr'?"),
        (["stepz=1"], "unknown setting 'stepz'; did you mean 'steps'?"),
        (["steps=many"], "steps='many': Input should be a valid integer."),
        (["steps=0"], "steps=0: Input should be greater than or equal to 1."),
        (["optim.name=sgd"], "optim.name='sgd': Input should be 'adamw', 'adamw8bit', "),
        (["optim.betas=[0.1]"], "optim.betas"),
        (["optim=3", "optim.lr=1"], "optim.lr: optim was given a value of its own before"),
    ],
)
def test_a_bad_override_is_refused_in_a_sentence(words, said):
    with pytest.raises(SettingsError) as error:
        parse("train", "model=m", "data=d", "output=o", *words)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--optim.lrr", "1"], "--optim.lr"), (["--steps", "many"], "--steps"), (["--steps", "0"], "equal to 1")],
)
def test_a_bad_flag_is_refused_with_what_is_valid(words, said, capsys):
    with pytest.raises(SystemExit) as error:
        parse("train", "model=m", "data=d", "output=o", *words)
    assert error.value.code == 2
    assert said in capsys.readouterr().err


def test_what_is_missing_is_said():
    with pytest.raises(SettingsError, match=r"data is not set; give data=\.\.\.\noutput is not set; give output="):
        parse("train", "model=m")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give exactly one of: start and end, loop, manifest."),
        (["start=a"], "both start and end"),
        (["loop=a", "manifest=b"], "exactly one of"),
        (["loop=a", "scales=[1,2]"], "2 scales for 0 patches"),
    ],
)
def test_infer_wants_one_kind_of_input(words, said):
    with pytest.raises(SettingsError) as error:
        parse("infer", "output=o", *words)
    assert said in str(error.value)


def test_films_are_made_prepared_evaluated_and_compared(tmp_path, capsys):
    """Procedural films from the command line to a table, along the way that the commands themselves point out."""
    films, data = tmp_path / "films", tmp_path / "data"
    worlds = ["worlds", "world=control", f"output={films}", "count=3", "num_frames=5", "size=32"]
    assert main(worlds) == 0
    said = re.search(r"to evaluate on them: trfpp (.*)", capsys.readouterr().out)[1]
    assert main(worlds) == 2
    assert "replace them with overwrite=true" in capsys.readouterr().err
    assert main([*worlds, "seed=1", "overwrite=true"]) == 0
    assert main(shlex.split(said.replace("output=...", f"output={data}"))) == 0
    for baseline in ("cross_fade", "flow_warp"):
        words = [f"data={data}", f"output={tmp_path / baseline}", f"truth={films / 'truth.jsonl'}"]
        assert main(["evaluate", *words, f"baseline={baseline}"]) == 0
    assert (tmp_path / "cross_fade" / "evaluate.yaml").is_file()
    capsys.readouterr()
    assert main(["compare", f"a={tmp_path / 'cross_fade'}", f"b={tmp_path / 'flow_warp'}"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"^track_percent +3 ", table, flags=re.MULTILINE)
    assert "settings that differ: baseline" in table


def test_films_do_not_replace_other_things(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years")
    assert main(["worlds", "world=control", f"output={tmp_path}", "count=1", "overwrite=true"]) == 2
    assert "something else is there" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years"


def test_the_record_of_a_result_is_a_config(tmp_path):
    record = tmp_path / "generation.json"
    record.write_text('{"config": {"model": "m", "loop": "a.png", "seed": 3}, "sha256": {}}')
    assert parse("infer", str(record), "output=o").seed == 3


def test_unknown_commands_recipes_and_files_name_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err
    assert main(["train", "svd_xl", "model=m", "data=d", "output=o"]) == 2
    assert "did you mean the recipe 'svd_xt'?" in capsys.readouterr().err
    assert main(["train", "nowhere.yaml"]) == 2
    assert "nowhere.yaml: no such file" in capsys.readouterr().err


def test_a_reader_who_has_seen_enough_is_told_nothing():
    """As in `trfpp train --help | head`."""
    words = [sys.executable, "-m", "trfpp", "train", "--help"]
    ours, its = os.pipe()
    os.close(ours)
    done = subprocess.run(words, stdout=its, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(its)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == ""


def test_a_mistake_is_one_sentence_and_status_2(tmp_path):
    done = run("train", "model=miniature", f"data={tmp_path}", f"output={tmp_path / 'o'}")
    assert done.returncode == 2
    assert "not a clip dataset" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="an installed package has no README")
@pytest.mark.parametrize("document", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))])
def test_commands_in_the_documents_parse(document):
    """Every `trfpp COMMAND …` and `accelerate launch … -m trfpp.train …` in a code block has valid settings."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for line in lines:
        match = re.match(r"(?:.*\s)?(?:trfpp (?P<command>\w+)|-m trfpp\.train)(?P<rest>.*)", line.split("#")[0])
        if not match or "--help" in line:
            continue
        command = match["command"] or "train"
        words = shlex.split(match["rest"])
        if words and not words[0].startswith("-") and "=" not in words[0] and words[0] not in recipes(command):
            words = words[1:] + NEEDED.get(command, [])
        assert parse(command, *words)
