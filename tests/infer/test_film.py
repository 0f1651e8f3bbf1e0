"""Films to files: what is written, that the record repeats it to the bit, what is kept, and what is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from diffusers import UNetSpatioTemporalConditionModel
from PIL import Image

from trfpp.__main__ import main
from trfpp.configs.load import command_line
from trfpp.configs.schema import FilmConfig, SamplerOverrides
from trfpp.infer import results
from trfpp.infer.film import film, plan

ON_LINUX = pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no /proc")
SMALL = SamplerOverrides(height=32, width=48, num_frames=6, num_inference_steps=2)


@pytest.fixture
def keyframes(tmp_path):
    """Three images of different sizes."""
    generator, paths = np.random.default_rng(0), []
    for name, size in {"a": (32, 48), "b": (40, 90), "c": (90, 40)}.items():
        pixels = generator.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{name}.png")
        Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC).save(paths[-1])
    return paths


@pytest.fixture
def settings(tiny_model, keyframes, tmp_path):
    """`settings(**changes)` is a small film."""

    def make(**changes):
        told = {"keyframes": keyframes, "times": [0, 2, 6], "output": tmp_path / "out", "sampler": SMALL}
        return FilmConfig(**{"model": str(tiny_model), **told, **changes})

    return make


def frames(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted((folder / "frames").iterdir())])


def test_a_film_is_written_and_its_record_repeats_it(settings, tmp_path):
    config = settings()
    assert film(config)
    assert sorted(path.name for path in config.output.iterdir()) == ["frames", "generation.json", "video.mp4"]
    made = frames(config.output)
    assert made.shape == (7, 32, 48, 3)
    record = json.loads((config.output / "generation.json").read_text(encoding="utf-8"))
    assert record["config"]["times"] == [0, 2, 6]
    assert len(record["sha256"]["keyframes"]) == 3
    assert record["sources"]["num_frames"] == "caller"
    again = command_line(FilmConfig, "film", [str(config.output / "generation.json"), f"output={tmp_path / 'again'}"])
    assert film(again)
    assert np.array_equal(frames(again.output), made)


def test_a_closed_film_has_the_frames_that_were_asked_for(settings):
    config = settings(closed=True, frames=9)
    film(config)
    assert len(frames(config.output)) == 9


def test_what_is_there_is_kept_until_it_is_to_be_replaced(settings, capsys):
    film(settings())
    before = frames(settings().output)
    assert not film(settings())
    assert not film(settings(seed=1))
    assert "though made with another seed" in capsys.readouterr().out
    assert np.array_equal(frames(settings().output), before)
    assert film(settings(seed=1, overwrite=True))
    assert not np.array_equal(frames(settings().output), before)


def test_something_else_at_the_output_stays(settings):
    settings().output.mkdir()
    (settings().output / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="something else than a film"):
        film(settings())
    assert (settings().output / "letter.txt").exists()


def test_a_result_of_a_pair_is_no_film_to_replace(settings):
    settings().output.mkdir()
    (settings().output / "generation.json").write_text('{"config": {"start": "a.png", "sampler": {}}, "sha256": {}}')
    with pytest.raises(ValueError, match="something else than a film"):
        film(settings(overwrite=True))


@pytest.mark.parametrize("text", ["{", "[]", '{"config": {}}'])
def test_a_broken_record_is_said_with_its_name(settings, text):
    settings().output.mkdir()
    (settings().output / "generation.json").write_text(text)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"out/generation\.json: the record is broken, .*; move "):
            film(settings(overwrite=overwrite))


@pytest.mark.parametrize("when", ["write_frames", "write_video"])
def test_an_interrupt_while_a_film_is_written_leaves_no_half(settings, monkeypatch, when):
    """Of what was there nothing changes, and the same command makes the film."""
    write = getattr(results, when)

    def interrupted(*args):
        write(*args)
        raise KeyboardInterrupt

    def interrupt(config):
        with monkeypatch.context() as stopped:
            stopped.setattr(results, when, interrupted)
            with pytest.raises(KeyboardInterrupt):
                film(config)

    config = settings()
    interrupt(config)
    assert not list(config.output.iterdir())
    assert film(config)
    before = {path: path.read_bytes() for path in config.output.rglob("*.*")}
    interrupt(settings(seed=1, overwrite=True))
    assert {path: path.read_bytes() for path in config.output.rglob("*.*")} == before
    assert film(settings(seed=1, overwrite=True, save_frames=False))
    assert sorted(path.name for path in config.output.iterdir()) == ["generation.json", "video.mp4"]


def test_a_film_whose_replacing_was_interrupted_is_made_again(settings, monkeypatch):
    """Also in the short time in which its parts take their places, and it has no record."""
    config = settings(seed=1, overwrite=True)
    film(settings())
    with monkeypatch.context() as stopped:
        rename = os.replace

        def interrupted(source, target):
            rename(source, target)
            if Path(target).name == "video.mp4":
                raise KeyboardInterrupt

        stopped.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            film(config)
    assert not (config.output / "generation.json").exists()
    assert film(settings(seed=1))
    assert sorted(path.name for path in config.output.iterdir()) == ["frames", "generation.json", "video.mp4"]
    assert json.loads((config.output / "generation.json").read_text(encoding="utf-8"))["config"]["seed"] == 1


def test_what_a_killed_process_left_hidden_is_nothing_else(settings):
    settings().output.mkdir()
    (settings().output / ".video.elsewhere.5.tmp.mp4").write_text("half")
    assert film(settings())


@pytest.mark.parametrize("output", ["letter.txt", pytest.param("/proc/nope", marks=ON_LINUX)])
def test_an_output_that_cannot_be_written_to_is_said_before_weights_are_loaded(settings, tmp_path, monkeypatch, output):
    (tmp_path / "letter.txt").write_text("dear")
    monkeypatch.setattr("trfpp.infer.film.load_pipeline", None)
    with pytest.raises(ValueError, match=r"output='.*': no results can be written there \(.*\); choose another"):
        film(settings(output=tmp_path / output))


def test_the_folder_one_is_in_can_be_the_output(settings, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert film(settings(output=Path(".")))
    assert (tmp_path / "here" / "generation.json").is_file()


def test_the_plan_counts_passes_and_calls(settings):
    said = plan(settings(times=[0, 2, 30]))
    assert "frame 30:" in said
    assert "pass 4: 31 frames through 12, at 7 fps" in said
    made = int(said.split("film of 31 frames: ")[1].split(" UNet calls")[0])
    film(settings(times=[0, 2, 30]))
    record = json.loads((settings().output / "generation.json").read_text(encoding="utf-8"))
    assert record["unet_calls"] == made


@pytest.mark.parametrize(("closed", "seen"), [(False, 8), (True, 6)])
def test_the_plan_says_how_many_frames_a_call_sees(settings, closed, seen, monkeypatch):
    """Of a film shorter than a window: of an open one the call sees a whole window, of a closed one all around."""
    sampler = SMALL.model_copy(update={"num_frames": 8})
    around = {"closed": True, "frames": 5} if closed else {}
    config, sizes = settings(times=[0, 1, 3], sampler=sampler, **around), set()
    assert plan(config).endswith(f"UNet calls of {seen} frames")
    predict = UNetSpatioTemporalConditionModel.forward

    def watched(unet, sample, *args, **kwargs):
        sizes.add(sample.shape[1])
        return predict(unet, sample, *args, **kwargs)

    monkeypatch.setattr(UNetSpatioTemporalConditionModel, "forward", watched)
    film(config)
    assert sizes == {seen}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"times": [0, 3, 3]}, "must begin with 0 and rise"),
        ({"frames": 3}, "ends at its last keyframe, at 6"),
        ({"sampler": SMALL.model_copy(update={"fps": "auto"})}, "auto is for pairs"),
        ({"sampler": SMALL.model_copy(update={"sampler": "gi"})}, "made by trf"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_loaded(settings, changes, said, monkeypatch):
    monkeypatch.setattr("trfpp.infer.film.load_pipeline", None)
    with pytest.raises(ValueError, match=said):
        film(settings(**changes))


def test_the_command_line(settings, keyframes, tiny_model, tmp_path, capsys):
    words = [f"keyframes=[{','.join(map(str, keyframes))}]", f"output={tmp_path / 'out'}", f"model={tiny_model}"]
    small = ["sampler.height=32", "sampler.width=48", "sampler.num_frames=6", "sampler.num_inference_steps=2"]
    assert main(["film", *words, "times=[0,2]"]) == 2
    assert "2 times for 3 keyframes" in capsys.readouterr().err
    assert main(["film", *words, *small, "times=[0,2,4]", "closed=true"]) == 2
    assert "say how many a closed film has" in capsys.readouterr().err
    assert main(["film", *words, *small, "times=[0,2,4]", "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()
    assert main(["film", *words, *small, "times=[0,2,4]"]) == 0
    assert (tmp_path / "out" / "film.yaml").is_file()
