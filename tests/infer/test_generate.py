"""Generation to files: what is written, that a result depends on its own settings alone, that its record repeats it to
the bit, and what happens to bad pairs, results that are there and interrupted runs."""

import _thread
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from PIL import Image, ImageFile
from pydantic import ValidationError

from trfpp.configs.load import command_line
from trfpp.configs.schema import InferConfig, SamplerOverrides
from trfpp.data_prep.motion import motion_bucket
from trfpp.infer import claims, results
from trfpp.infer import generate as generating
from trfpp.infer.generate import PairsFailed, generate, plan
from trfpp.infer.models import load_pipeline
from trfpp.trf.device import best_device
from trfpp.trf.pipeline import TimeReversalFusionPipeline
from trfpp.trf.settings import resolve

ON_LINUX = pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no /proc")
SMALL = SamplerOverrides(height=32, width=48, num_frames=4, num_inference_steps=2)


@pytest.fixture
def images(tmp_path):
    """A folder of four images of different sizes."""
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, size in {"a": (32, 48), "b": (40, 90), "c": (90, 40), "d": (64, 64)}.items():
        pixels = generator.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def settings(tiny_model, images, tmp_path):
    """`settings(**changes)` is a small pair."""

    def make(**changes):
        bounds = {} if {"loop", "manifest"} & changes.keys() else {"start": images / "a.png", "end": images / "b.png"}
        return InferConfig(
            **{"model": str(tiny_model), "output": tmp_path / "out", "sampler": SMALL, **bounds, **changes}
        )

    return make


def manifest(images, *rows, name="pairs.jsonl"):
    (images / name).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return images / name


def frames(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted((folder / "frames").iterdir())])


def record(folder):
    return json.loads((folder / "generation.json").read_text(encoding="utf-8"))


def test_a_pair_is_written_whole(settings, images):
    (folder,) = generate(settings(patches=[]))
    assert folder.name == "a-b"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["a-b"]
    assert sorted(path.name for path in folder.iterdir()) == ["frames", "generation.json", "video.mp4"]
    assert [path.name for path in sorted((folder / "frames").iterdir())] == [f"0000{i}.png" for i in range(4)]
    assert frames(folder).shape == (4, 32, 48, 3)
    assert frames(folder).std() > 0
    with av.open(str(folder / "video.mp4")) as video:
        stream = video.streams.video[0]
        assert (stream.height, stream.width, stream.average_rate) == (32, 48, 7)
        assert len(list(video.decode(stream))) == 4
    about = record(folder)
    assert about["sources"]["height"] == "caller"
    assert about["sources"]["fps"] == "default"
    assert about["dtype"] == "float32"
    assert (about["unet_calls"], about["unet_forwards"]) == (4, 2)
    assert about["seconds"] > 0
    assert about["versions"].keys() == {"trfpp", "torch", "diffusers", "peft"}
    assert about["sha256"]["start"] == hashlib.sha256((images / "a.png").read_bytes()).hexdigest()


def test_loop_and_no_frames(settings, images):
    (folder,) = generate(settings(loop=images / "c.png", save_frames=False))
    assert folder.name == "c"
    assert sorted(path.name for path in folder.iterdir()) == ["generation.json", "video.mp4"]
    assert record(folder)["config"]["loop"] == str(images / "c.png")


def test_results_do_not_depend_on_the_order(settings, images, tmp_path):
    rows = [
        {"id": "one", "start": "a.png", "end": "b.png"},
        {"id": "two", "start": "c.png", "end": "d.png", "seed": 5, "fps": 12, "motion_bucket_id": 40},
        {"id": "three", "loop": "d.png", "num_frames": 5},
    ]
    sampler = SamplerOverrides(height=32, width=48, num_inference_steps=3, jump_length=1, repeat_step_ratio=0.3)
    rows[0]["num_frames"] = rows[1]["num_frames"] = 4
    there = generate(settings(manifest=manifest(images, *rows), output=tmp_path / "there", sampler=sampler))
    back = generate(settings(manifest=manifest(images, *rows[::-1]), output=tmp_path / "back", sampler=sampler))
    assert [folder.name for folder in there] == [folder.name for folder in back[::-1]] == ["one", "two", "three"]
    for ours, theirs in zip(there, back[::-1]):
        assert np.array_equal(frames(ours), frames(theirs))
    assert len(frames(there[2])) == 5
    two = record(there[1])
    assert (two["config"]["seed"], two["config"]["sampler"]["fps"]) == (5, 12)
    assert two["sources"]["motion_bucket_id"] == "manifest"
    assert record(there[0])["config"]["seed"] == 42

    alone = {"start": images / "c.png", "end": images / "d.png", "seed": 5}
    of_two = sampler.model_copy(update={"fps": 12.0, "motion_bucket_id": 40.0, "num_frames": 4})
    (single,) = generate(settings(**alone, sampler=of_two))
    assert np.array_equal(frames(single), frames(there[1]))
    (other,) = generate(settings(**{**alone, "seed": 6}, sampler=of_two, overwrite=True))
    assert not np.array_equal(frames(other), frames(there[1]))


def test_pairs_of_several_sizes_come_each_in_its_own(settings, make_patch, images):
    """As the manifest of a dataset with portrait and landscape clips asks; what is said goes before."""
    rows = [
        {"id": "wide", "start": "a.png", "end": "b.png", "height": 32, "width": 48, "num_frames": 4},
        {"id": "tall", "start": "c.png", "end": "d.png", "height": 48, "width": 32, "num_frames": 5},
    ]
    own = {"manifest": manifest(images, *rows), "patches": [make_patch()]}
    steps = SamplerOverrides(num_inference_steps=2)
    assert "height=48, width=32, num_frames=5: " in plan(settings(**own, sampler=steps))
    wide, tall = generate(settings(**own, sampler=steps))
    assert frames(wide).shape == (4, 32, 48, 3)
    assert frames(tall).shape == (5, 48, 32, 3)
    assert record(tall)["sources"]["width"] == "manifest"
    said = SamplerOverrides(num_inference_steps=2, height=32, width=32)
    assert "width=" not in plan(settings(**own, sampler=said)).split("pairs: ")[1]


def test_a_record_repeats_its_result_to_the_bit(settings, make_patch, images, tmp_path):
    patches = [
        make_patch("one/patch", targets="all", fps=11),
        make_patch("two/patch", seed=3, sampler={"jump_length": 1}),
    ]
    first = settings(
        patches=patches,
        scales=[1.0, 0.5],
        fit="pad",
        seed=7,
        low_memory=True,
        decode_chunk_size=3,
        manifest=manifest(images, {"start": "a.png", "end": "c.png", "motion_bucket_id": 60, "seed": 8}),
    )
    (folder,) = generate(first)
    about = record(folder)
    assert about["sources"]["fps"] == "patch card"
    assert about["sources"]["jump_length"] == "patch card"
    assert about["config"]["sampler"]["fps"] == 9
    weights = [(patch / "adapter_model.safetensors").read_bytes() for patch in patches]
    assert about["sha256"]["patches"] == [hashlib.sha256(data).hexdigest() for data in weights]

    again = {**about["config"], "output": str(tmp_path / "again")}
    (repeated,) = generate(InferConfig.model_validate_json(json.dumps(again)))
    assert np.array_equal(frames(repeated), frames(folder))
    told = record(repeated)
    assert {**told["config"]} == about["config"]
    assert set(told["sources"].values()) == {"caller"}

    for number, change in enumerate(({"scales": [1.0, 0.0]}, {"fit": "crop"})):
        other = {**again, **change, "output": str(tmp_path / str(number))}
        (changed,) = generate(InferConfig.model_validate_json(json.dumps(other)))
        assert not np.array_equal(frames(changed), frames(folder))


def test_patches_of_any_direction_at_scales_of_each_half(settings, make_patch, tmp_path):
    folders = {way: make_patch(way, seed=number, direction=way) for number, way in enumerate(("backward", "both"))}
    config = settings(patches=list(folders.values()), scales=[0.5, (1.0, 0.25)])
    assert load_pipeline(config).patch_scales == {"0_backward": (0, 0.5), "1_both": (1, 0.25)}
    text = plan(config)
    assert "backward at 0.5" in text
    assert "both at 1 forward, 0.25 backward" in text
    (folder,) = generate(config)
    about = record(folder)
    assert about["config"]["scales"] == [0.5, [1, 0.25]]
    digests = about["sha256"]["patches"]
    file = folders["both"] / "forward" / "adapter_model.safetensors"
    assert digests[1]["forward"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert digests[1].keys() == {"forward", "backward"}
    assert isinstance(digests[0], str)

    again = {**about["config"], "output": str(tmp_path / "again")}
    (repeated,) = generate(InferConfig.model_validate_json(json.dumps(again)))
    assert np.array_equal(frames(repeated), frames(folder))
    assert record(repeated)["config"] == about["config"]
    for number, scales in enumerate(([0.5, 1], [[0.5, 0.5], [1, 0.25]])):
        other = {**again, "scales": scales, "output": str(tmp_path / str(number))}
        (changed,) = generate(InferConfig.model_validate_json(json.dumps(other)))
        assert not np.array_equal(frames(changed), frames(folder))


def test_fused_patches_give_the_same_and_are_on_record(settings, make_patch, tmp_path):
    patches = [make_patch("one", seed=1), make_patch("other", seed=2, direction="both")]
    (live,) = generate(settings(patches=patches, scales=[0.5, 1.0]))
    (fused,) = generate(settings(patches=patches, scales=[0.5, 1.0], fuse=True, output=tmp_path / "fused"))
    (without,) = generate(settings(output=tmp_path / "without"))
    assert np.abs(frames(fused).astype(int) - frames(live)).max() <= 1
    assert np.abs(frames(without).astype(int) - frames(live)).max() > 5
    assert record(fused)["config"] == {**record(live)["config"], "fuse": True}


def test_pairs_of_scales_on_the_command_line(tmp_path):
    words = ["output=o", "loop=a", "patches=[p,q,r]", "scales=[1,[0.5,0],-2]"]
    for more in ([], ["--seed", "3"]):  # with and without tyro
        assert command_line(InferConfig, "infer", [*words, *more]).scales == [1, (0.5, 0), -2]
    (tmp_path / "run.yaml").write_text("loop: a\npatches: [p, q]\nscales:\n- [1, 0]\n- 0.5\n")
    config = command_line(InferConfig, "infer", [str(tmp_path / "run.yaml"), "output=o"])
    assert config.scales == [(1, 0), 0.5]
    (tmp_path / "again.yaml").write_text(config.as_yaml())
    assert command_line(InferConfig, "infer", [str(tmp_path / "again.yaml")]) == config


def test_a_result_at_a_pair_of_scales_is_known_again(settings, make_patch, capsys):
    config = settings(patches=[make_patch(direction="both")], scales=[(1.0, 0.5)])
    generate(config)
    capsys.readouterr()
    generate(config)
    assert "made with another" not in capsys.readouterr().out
    generate(config.model_copy(update={"scales": [(1.0, 0.25)]}))
    assert "made with another scales; see overwrite=true" in capsys.readouterr().out


def test_the_command_line_goes_before_the_manifest_and_that_before_the_card(settings, make_patch, images, capsys):
    row = {"start": "a.png", "end": "b.png", "fps": 20, "motion_bucket_id": 30}
    config = settings(
        patches=[make_patch(fps=11, sampler={"motion_bucket_id": 99, "noise_scale_ratio": 0.9})],
        manifest=manifest(images, row),
        sampler=SamplerOverrides(num_inference_steps=2, fps=5.0),
    )
    (folder,) = generate(config)
    about = record(folder)
    used, sources = about["config"]["sampler"], about["sources"]
    assert (used["fps"], sources["fps"]) == (5, "caller")
    assert (used["motion_bucket_id"], sources["motion_bucket_id"]) == (30, "manifest")
    assert (used["noise_scale_ratio"], sources["noise_scale_ratio"]) == (0.9, "patch card")
    assert (used["height"], sources["height"]) == (32, "patch card")
    assert (used["max_guidance_scale"], sources["max_guidance_scale"]) == (3, "default")
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("from the patch card"))
    assert "noise_scale_ratio=0.9" in said
    assert "fps" not in said


CALIBRATION = {
    "clips": 40, "nearest": (-7.0, -7.0), "farthest": (5.0, 0.0), "way": (1.0, 0.1, 0.0), "way_explained": 0.5,
    "fps": (2.0, 0.0, 0.0), "fps_explained": 0.0,
}  # fmt: skip
"""A way of e % of the diagonal, longer with the flow, at e^2 frames per second."""


def test_fps_and_motion_are_measured_where_asked_for(settings, make_patch, images, capsys):
    rows = [{"id": "near", "loop": "a.png", "fps": 20}, {"id": "far", "start": "a.png", "end": "b.png", "fps": 20}]
    sampler = SamplerOverrides(num_inference_steps=1, motion_bucket_id="auto")
    config = settings(patches=[make_patch(calibration=CALIBRATION)], manifest=manifest(images, *rows), sampler=sampler)
    text = plan(config)
    assert "motion_bucket_id = measured of each pair" in text
    near, far = (record(folder) for folder in generate(config))
    buckets = [one["config"]["sampler"]["motion_bucket_id"] for one in (near, far)]
    assert buckets[0] == round(motion_bucket(math.exp(1 + 0.1 * math.log(1e-3)) * 20 / 3), 1)  # four frames
    assert buckets[1] > buckets[0]
    assert f"seed=42, fps=20.0, motion_bucket_id={buckets[1]}: 2 UNet calls" in text
    assert far["sources"]["motion_bucket_id"] == "measured"
    assert (far["config"]["sampler"]["fps"], far["sources"]["fps"]) == (20, "manifest")
    assert f"far: measured motion_bucket_id={buckets[1]}" in capsys.readouterr().out

    both = config.model_copy(update={"sampler": sampler.model_copy(update={"fps": "auto"}), "overwrite": True})
    far = record(generate(both)[1])
    assert far["config"]["sampler"]["fps"] == 7.39
    assert far["sources"]["fps"] == "measured"


def test_measuring_needs_a_patch_that_knows_how(settings, make_patch):
    sampler = SMALL.model_copy(update={"fps": "auto"})
    with pytest.raises(ValueError, match=r"sampler.fps=auto: no patch is loaded whose card holds a calibration"):
        generate(settings(sampler=sampler, patches=[make_patch()]))


@pytest.mark.parametrize("length", [0, 60])
def test_measuring_fails_for_a_bad_image_alone(settings, make_patch, images, length):
    """Also for one whose header is whole."""
    (images / "bad.png").write_bytes((images / "a.png").read_bytes()[:length])
    rows = [{"start": "bad.png", "end": "b.png"}, {"start": "a.png", "end": "b.png"}]
    config = settings(
        patches=[make_patch(calibration=CALIBRATION)],
        manifest=manifest(images, *rows),
        sampler=SMALL.model_copy(update={"motion_bucket_id": "auto"}),
    )
    with pytest.raises(PairsFailed, match="1 of 2 pairs failed") as failed:
        generate(config)
    assert len(failed.value.folders) == 1


def test_a_record_from_before_a_setting_repeats_what_there_was(settings, tmp_path):
    """Since then the sampler may have got a default of its own, which the record's result was made without."""
    (folder,) = generate(
        settings(
            sampler=SMALL.model_copy(
                update={"sampler": "trf++", "max_guidance_sigma": 1000.0, "min_guidance_sigma": 0.0}
            )
        )
    )
    about = record(folder)
    for name in ("min_guidance_sigma", "max_guidance_sigma", "patch_schedule", "patch_frames"):
        del about["config"]["sampler"][name]
    (tmp_path / "generation.json").write_text(json.dumps(about))
    again = command_line(InferConfig, "infer", [str(tmp_path / "generation.json"), f"output={tmp_path / 'again'}"])
    (repeated,) = generate(again)
    assert np.array_equal(frames(repeated), frames(folder))


def test_a_result_is_kept_unless_overwritten(settings, capsys):
    (folder,) = generate(settings())
    before = frames(folder)
    capsys.readouterr()
    assert generate(settings()) == [folder]
    assert "made with another" not in capsys.readouterr().out
    about = record(folder)
    del about["config"]["sampler"]["patch_schedule"]  # as a record from before there was such a setting
    (folder / "generation.json").write_text(json.dumps(about))
    stamp = (folder / "generation.json").stat().st_mtime_ns
    assert generate(settings()) == [folder]
    assert "made with another" not in capsys.readouterr().out
    assert generate(settings(seed=1)) == [folder]
    assert "made with another seed; see overwrite=true" in capsys.readouterr().out
    assert (folder / "generation.json").stat().st_mtime_ns == stamp
    generate(settings(seed=1, overwrite=True))
    assert not np.array_equal(frames(folder), before)

    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="move it away"):
        generate(settings(overwrite=True))
    assert (folder / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("text", ["{", "[]", '{"config": {}}', '{"config": {}, "sha256": {}}'])
def test_a_broken_record_is_said_with_its_name(settings, text):
    folder = settings().output / "a-b"
    folder.mkdir(parents=True)
    (folder / "generation.json").write_text(text)
    with pytest.raises(ValueError, match=r"a-b/generation\.json: the record is broken, .*; move "):
        generate(settings())
    assert generate(settings(overwrite=True)) == [folder]


def test_which_of_several_devices_decides_nothing(settings, capsys):
    (folder,) = generate(settings(device="cpu:0"))
    assert record(folder)["config"]["device"] == "cpu"
    generate(settings())
    assert "made with another" not in capsys.readouterr().out


def test_bad_pairs_are_reported_and_the_rest_goes_on(settings, images, capsys):
    (images / "broken.png").write_bytes((images / "a.png").read_bytes()[:60])
    rows = [
        {"id": "bad", "start": "a.png", "end": "broken.png"},
        {"id": "good", "start": "a.png", "end": "b.png"},
    ]
    with pytest.raises(PairsFailed, match=r"1 of 2 pairs failed:\n  bad: .*broken\.png: not a readable image") as error:
        generate(settings(manifest=manifest(images, *rows)))
    (folder,) = error.value.folders
    out = capsys.readouterr().out
    assert folder.name == "good"
    assert "1 generated, 0 there already, 1 failed" in out
    assert [path.name for path in folder.parent.iterdir()] == ["good"]
    with pytest.raises(ValueError, match=r"1 of 1 pairs failed:\n  a-broken: .*broken\.png"):
        generate(settings(start=images / "a.png", end=images / "broken.png"))
    with pytest.raises(ValueError, match="nowhere"):
        generate(settings(start=images / "a.png", end=images / "nowhere.png"))


def test_a_video_that_is_not_finite_is_refused(settings, make_patch):
    with pytest.raises(ValueError, match="not finite at precision=no"):
        generate(settings(patches=[make_patch(size=1e30)]))
    assert not settings().output.exists()


def test_only_headers_are_read_before_the_weights_are(settings, images, monkeypatch):
    decode, load = ImageFile.ImageFile.load, load_pipeline
    decoded = []

    def decoding(self):
        decoded.append(self.filename)
        return decode(self)

    def loading(config):
        assert not decoded
        return load(config)

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoding)
    monkeypatch.setattr(generating, "load_pipeline", loading)
    generate(settings(manifest=manifest(images, {"start": "a.png", "end": "b.png"}, {"loop": "c.png"})))
    assert {Path(name).name for name in decoded} == {"a.png", "b.png", "c.png"}


def three(images):
    """A manifest."""
    return manifest(images, *({"id": name, "start": "a.png", "end": "b.png"} for name in ("one", "two", "three")))


def test_an_interrupt_keeps_what_is_sampled(settings, images, monkeypatch):
    write = results.write_frames
    written = []

    def interrupted(folder, pixels):
        written.append(folder)
        if len(written) == 2:
            _thread.interrupt_main()
            time.sleep(0.5)  # so long that the third would be sampled
        write(folder, pixels)

    monkeypatch.setattr(results, "write_frames", interrupted)
    config = settings(manifest=three(images))
    with pytest.raises(KeyboardInterrupt):
        generate(config)
    assert sorted(os.listdir(config.output)) == ["one", "two"]
    assert [len(frames(config.output / name)) for name in ("one", "two")] == [4, 4]
    assert [folder.name for folder in generate(config)] == ["one", "two", "three"]
    assert len(written) == 3


def test_a_result_is_written_and_claimed_while_the_next_one_is_sampled(settings, images, monkeypatch):
    write, call = results.write_frames, TimeReversalFusionPipeline.__call__
    config = settings(manifest=three(images))
    sampled = [threading.Event() for _ in range(3)]
    written = []

    def sampling(self, *args, **kwargs):
        number = sum(event.is_set() for event in sampled)
        assert len(written) >= number - 1  # one waits at most
        made = call(self, *args, **kwargs)
        sampled[number].set()
        return made

    def writing(folder, pixels):
        name = folder.parent.name.split(".")[1]
        assert name == ("one", "two", "three")[len(written)]
        assert sampled[min(len(written) + 1, 2)].wait(60)
        with pytest.raises(Timeout):
            FileLock(config.output / ".claims" / f"{name}.lock").acquire(blocking=False)
        write(folder, pixels)
        written.append(name)

    monkeypatch.setattr(TimeReversalFusionPipeline, "__call__", sampling)
    monkeypatch.setattr(results, "write_frames", writing)
    generate(config)
    assert sorted(os.listdir(config.output)) == ["one", "three", "two"]


def test_a_result_that_cannot_be_written_ends_the_run(settings, images, monkeypatch):
    write = results.write_video

    def full(path, pixels, fps):
        if ".one." in str(path):
            raise OSError(28, "No space left on device", str(path))
        write(path, pixels, fps)

    monkeypatch.setattr(results, "write_video", full)
    config = settings(manifest=three(images))
    with pytest.raises(OSError, match=r"No space left on device: .*one"):
        generate(config)
    assert os.listdir(config.output) == ["two"]  # which was sampled by then


def test_processes_share_a_manifest(settings, images):
    rows = [{"id": f"pair{i}", "start": "a.png", "end": "bcd"[i % 3] + ".png", "seed": i} for i in range(6)]
    config = settings(manifest=manifest(images, *rows))
    file = images / "infer.yaml"
    config.save(file, "infer")
    command = [sys.executable, "-m", "trfpp", "infer", str(file)]
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many as here: rounding depends on it
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=threads) for _ in range(2)]
    said = [run.communicate(timeout=300)[0].splitlines()[-1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sum(int(line.split(": ")[1].split(" generated")[0]) for line in said) == 6
    assert sorted(os.listdir(config.output)) == ["infer.yaml", *(row["id"] for row in rows)]
    alone = generate(settings(manifest=manifest(images, rows[4]), output=images / "alone"))
    assert np.array_equal(frames(alone[0]), frames(config.output / "pair4"))


def test_a_launcher_starts_processes_that_share_a_manifest(settings, images):
    """As docs/sampling.md says, here without GPUs."""
    config = settings(manifest=manifest(images, *({"id": f"pair{i}", "loop": "a.png", "seed": i} for i in range(4))))
    file = images / "infer.yaml"
    config.save(file, "infer")
    machine = Path(__file__).parents[2] / "launch" / "many_gpus.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(machine)]
    command = [*launcher, "--num_processes", "2", "-m", "trfpp", "infer", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    said = re.findall(r": (\d+) generated, ", done.stdout)  # both may end up in one line
    assert len(said) == 2
    assert sum(map(int, said)) == 4
    assert len(list(config.output.glob("*/generation.json"))) == 4


def test_each_process_of_a_launcher_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert best_device() == torch.device("cuda")
    for rank, index in (("0", 0), ("3", 3), ("6", 2)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert best_device() == best_device("cuda") == torch.device("cuda", index)
    assert best_device("cpu") == torch.device("cpu")


def test_what_another_process_is_at_is_waited_for_and_taken_over(settings, images, monkeypatch):
    monkeypatch.setattr(claims, "WAIT", 0.05)
    rows = [{"id": name, "start": "a.png", "end": "b.png"} for name in ("one", "two")]
    config = settings(manifest=manifest(images, *rows))
    other = FileLock(config.output / ".claims" / "one.lock", thread_local=False)
    other.acquire()

    def end():
        while not (config.output / "two" / "generation.json").exists():
            time.sleep(0.02)
        other.release()

    thread = threading.Thread(target=end)
    thread.start()
    assert [folder.name for folder in generate(config)] == ["one", "two"]
    thread.join()
    times = [(config.output / name / "generation.json").stat().st_mtime_ns for name in ("two", "one")]
    assert times == sorted(times)
    assert not (config.output / ".claims").exists()


@pytest.mark.parametrize(
    "output", ["letter.txt", pytest.param("/proc/nope", marks=ON_LINUX), pytest.param("/proc/self", marks=ON_LINUX)]
)
def test_an_output_that_cannot_be_written_to_is_said_before_weights_are_loaded(settings, tmp_path, monkeypatch, output):
    (tmp_path / "letter.txt").write_text("dear")
    monkeypatch.setattr(generating, "load_pipeline", None)
    with pytest.raises(ValueError, match=r"output='.*': no results can be written there \(.*\); choose another"):
        generate(settings(output=tmp_path / output))


def test_a_folder_of_claims_that_never_stays_ends_the_run(settings, monkeypatch):
    def gone(self, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr(FileLock, "acquire", gone)
    with pytest.raises(ValueError, match=r"\.claims: is gone whenever it was made"):
        generate(settings())
    assert not settings().output.exists()


def test_a_bad_pair_of_a_batch_leaves_the_others_alone(settings, images):
    rows = [{"id": name, "start": "a.png", "end": f"{name}.png"} for name in "bcd"]
    (images / "c.png").write_bytes((images / "c.png").read_bytes()[:60])  # which its header does not show
    config = settings(manifest=manifest(images, *rows), batch=3)
    with pytest.raises(PairsFailed, match=r"1 of 3 pairs failed:\n  c: .*c\.png: not a readable image"):
        generate(config)
    assert sorted(os.listdir(config.output)) == ["b", "d"]


def test_pairs_for_which_memory_is_short_fail_alone(settings, images, monkeypatch):
    """A batch that is too much is made one by one."""
    rows = [{"id": name, "start": "a.png", "end": f"{name}.png", "fps": fps} for name, fps in (("b", 5), ("c", 9))]
    config = settings(manifest=manifest(images, *rows), batch=2)
    call = TimeReversalFusionPipeline.__call__

    def scarce(self, start, end, **kwargs):
        if len(start) > 1 or kwargs["fps"] == [9]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return call(self, start, end, **kwargs)

    monkeypatch.setattr(TimeReversalFusionPipeline, "__call__", scarce)
    with pytest.raises(PairsFailed, match=r"1 of 2 pairs failed:\n  c: 4 frames of 32x48 .* memory; try") as failed:
        generate(config)
    for name in ("low_memory", "offload", "decode_chunk_size", "decode_tile_size"):
        assert name in str(failed.value)
    assert os.listdir(config.output) == ["b"]


def test_a_batch_holds_films_of_one_shape_and_changes_no_result(settings, images):
    rows = [
        {"id": f"pair{i}", "start": "a.png", "end": "b.png", "seed": i, "fps": 5 + i, "num_frames": 3 + (i == 1)}
        for i in range(4)
    ]
    sampler = SMALL.model_copy(update={"num_frames": None})
    make = partial(settings, manifest=manifest(images, *rows), sampler=sampler)
    together = generate(make(batch=3))
    assert [record(folder)["batch"] for folder in together] == [3, 1, 3, 3]
    assert [len(frames(folder)) for folder in together] == [3, 4, 3, 3]
    for one, other in zip(generate(make(output=images / "alone")), together):
        assert np.abs(frames(one).astype(int) - frames(other)).max() <= 1
        assert record(one)["config"] == record(other)["config"]


def test_the_plan_says_what_would_happen_and_writes_nothing(settings, make_patch, images):
    rows = [{"id": "one", "start": "a.png", "end": "b.png"}, {"id": "two", "loop": "c.png", "seed": 3, "fps": 4}]
    sampler = SamplerOverrides(num_inference_steps=5, jump_length=1)
    config = settings(
        manifest=manifest(images, *rows), sampler=sampler, patches=[make_patch(domain="tiny things")], low_memory=True
    )
    text = plan(config)
    assert not config.output.exists()
    for part in ("on cpu, float32", "patch at 1 (tiny things)", "height = 32 (patch card)", "pairs: 2, of which 0"):
        assert part in text
    two = next(line for line in text.splitlines() if line.startswith("  two: "))
    assert "seed=3, fps=4" in two
    folders = generate(config)
    assert f": {record(folders[0])['unet_calls']} UNet calls" in two
    assert plan(config).count(": there already") == 2


def test_what_cannot_work_is_said_before_weights_are_loaded(settings, make_patch, tiny_model, tmp_path):
    with pytest.raises(ValueError, match="block_out_channels"):
        generate(settings(model="miniature", patches=[make_patch()]))
    with pytest.raises(FileNotFoundError, match="not a patch"):
        generate(settings(patches=[tmp_path]))
    with pytest.raises(ValidationError, match="there are none"):
        settings(fuse=True)
    for points in ("patch_schedule", "patch_frames"):
        changing = make_patch(points, sampler={points: [[1.0, 0.5]]})
        for name in ("fuse", "compile"):
            with pytest.raises(ValueError, match=f"{name}=true keeps patches as they are, and {points}"):
                plan(settings(patches=[changing], **{name: True}))
    with pytest.raises(ValueError, match="offload=true"):
        generate(settings(device="cpu", offload=True))
    with pytest.raises(ValueError, match="device='cuda:9'"):
        generate(settings(device="cuda:9"))
    with pytest.raises(ValueError, match="height=33"):
        plan(settings(sampler=SMALL.model_copy(update={"height": 33})))
    with pytest.raises(ValueError, match="both directions in one UNet call; no low_memory"):
        plan(settings(sampler=SMALL.model_copy(update={"sampler": "gi"}), low_memory=True))
    rotated = make_patch("rotated", direction="backward", rotated_attention=True)
    with pytest.raises(ValueError, match="sampler='vibid' asks for one at a time"):
        plan(settings(sampler=SMALL.model_copy(update={"sampler": "vibid"}), patches=[rotated]))
    two = shutil.copytree(tiny_model, tmp_path / "two")
    shutil.copytree(two / "unet", two / "unet_backward")
    for told, said in (({"sampler": "gi"}, "this model has two"), ({"patch_frames": [(0.0, 1.0)]}, "this one has two")):
        with pytest.raises(ValueError, match=said):
            plan(settings(model=str(two), sampler=SMALL.model_copy(update=told)))
    assert not settings().output.exists()


def test_half_precision_is_applied_and_recorded(settings):
    config = settings(precision="bf16", device="cpu")
    assert str(load_pipeline(config).unet.dtype) == "torch.bfloat16"
    (folder,) = generate(config)
    assert record(folder)["dtype"] == "bfloat16"
    assert record(folder)["config"]["precision"] == "bf16"


def test_a_hub_model_is_recorded_by_its_commit(tiny_model, images, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(tiny_model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    words = f"infer model=someone/tiny output={tmp_path / 'out'} loop={images / 'a.png'} sampler.height=32"
    words += " sampler.width=48 sampler.num_frames=4 sampler.num_inference_steps=1"
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "trfpp", *words.split()], env=environment, check=True, cwd=tmp_path)
    assert record(tmp_path / "out" / "a")["config"]["revision"] == commit


@pytest.mark.parametrize(
    ("recipe", "fps", "motion_bucket_id", "noise_scale_ratio"),
    [("multiview", 7, 127, 1), ("video_frames", 7, 127, 0.95), ("gym_motion", 17, 10, 1), ("image2loop", 7, 127, 1)],
)
def test_recipes_hold_the_releases_settings(recipe, fps, motion_bucket_id, noise_scale_ratio):
    bounds = ["loop=a"] if recipe == "image2loop" else ["start=a", "end=b"]
    config = command_line(InferConfig, "infer", [recipe, "output=o", *bounds])
    # SVD-XT's UNet has 25 frames; its sample size of 96 stands for the release's 576 x 1024.
    resolved, _ = resolve(config.sampler.model_dump(), {}, {"num_frames": 25})
    settings = asdict(resolved)
    assert settings.pop("sampler") == "trf"
    assert settings == {
        "height": 576,
        "width": 1024,
        "num_frames": 25,
        "num_inference_steps": 50,
        "fps": fps,
        "motion_bucket_id": motion_bucket_id,
        "noise_aug_strength": 0.02,
        "min_guidance_scale": 1,
        "max_guidance_scale": 3,
        "jump_length": 5,
        "jump_n_sample": 2,
        "repeat_step_ratio": 0.8,
        "noise_scale_ratio": noise_scale_ratio,
        "min_guidance_sigma": 0,
        "max_guidance_sigma": 1000,  # beyond the largest there is
        "patch_schedule": (),
        "patch_frames": (),
    }
    assert (config.decode_chunk_size, config.seed) == (8, 42)
