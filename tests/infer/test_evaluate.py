"""Evaluation: what is written, that numbers depend on the pair alone, resuming, what is refused, and comparing two."""

import json

import numpy as np
import pytest
from PIL import Image

from trfpp.configs.schema import EvaluateConfig, SamplerOverrides
from trfpp.data_prep.frames import to_tensor, to_uint8
from trfpp.data_prep.procedural import write_world
from trfpp.data_prep.video import open_video
from trfpp.infer import evaluate as evaluating
from trfpp.infer.cases import cases_of
from trfpp.infer.compare import compare
from trfpp.infer.evaluate import evaluate, table
from trfpp.infer.metrics import inner_psnr
from trfpp.trf.base import load_component

CALIBRATION = {
    "clips": 40, "nearest": (-7.0, -7.0), "farthest": (5.0, 0.0), "way": (1.0, 0.1, 0.0), "way_explained": 0.5,
    "fps": (2.0, 0.0, 0.0), "fps_explained": 0.0,
}  # fmt: skip
SMALL = SamplerOverrides(height=32, width=32, num_inference_steps=2)
FRAMES = 4


def write_pairs(folder, films, **columns):
    """Films `{id: frames}` as bounded pairs with truth; gives the manifest."""
    rows = []
    for number, (name, frames) in enumerate(films.items()):
        (folder / name / "truth").mkdir(parents=True)
        for index, frame in enumerate(frames):
            Image.fromarray(frame).save(folder / name / "truth" / f"{index:05d}.png")
        Image.fromarray(frames[0]).save(folder / name / "start.png")
        Image.fromarray(frames[-1]).save(folder / name / "end.png")
        rows.append(
            {
                "id": name, "start": f"{name}/start.png", "end": f"{name}/end.png", "truth": f"{name}/truth",
                "fps": 5 + number, "motion_bucket_id": 30 * number, "num_frames": len(frames),
                "video": f"linear-{number:05d}.mp4", **columns,
            }
        )  # fmt: skip
    manifest = folder / "pairs.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Four films with their ground truth, as pairs: the manifest and the truth file."""
    folder = tmp_path_factory.mktemp("world")
    truth = write_world(folder / "films", "linear", count=4, seed=1, num_frames=FRAMES, side=32)
    films = {f"film{n}": open_video(folder / "films" / f"linear-{n:05d}.mp4", 1).read(range(FRAMES)) for n in range(4)}
    return write_pairs(folder / "pairs", films), truth


@pytest.fixture
def settings(tiny_model, world, tmp_path):
    """`settings(**changes)` measures the tiny model."""

    def make(**changes):
        model = {} if "baseline" in changes else {"model": str(tiny_model), "sampler": SMALL}
        return EvaluateConfig(**{"data": world[0], "output": tmp_path / "out", **model, **changes})

    return make


def rows(folder):
    return {row["id"]: row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}


def test_everything_is_measured_and_written(settings, world):
    config = settings(truth=world[1], save_videos=True)
    summary = evaluate(config)
    assert sorted(path.name for path in config.output.iterdir()) == [
        "metrics.jsonl", "recipe.json", "sheet.png", "summary.json", "videos",
    ]  # fmt: skip
    assert json.loads((config.output / "summary.json").read_text()) == summary
    assert len(list((config.output / "videos").iterdir())) == 4
    lines = rows(config.output)
    assert list(lines) == ["film0", "film1", "film2", "film3"]
    names = [
        "inner_psnr", "inner_ssim", "bound_psnr", "motion_ratio", "sharpness_ratio", "track_pixels", "track_percent",
        "disagreement",
    ]  # fmt: skip
    assert list(summary["metrics"]) == names
    for name in names:
        one = summary["metrics"][name]
        assert one["mean"] == pytest.approx(np.mean([row[name] for row in lines.values()]), abs=1e-5)
        assert one["low"] <= one["mean"] <= one["high"]
        assert f"{one['mean']:.4g}" in table(summary)
    assert lines["film2"]["made_with"]["fps"] == 7
    assert lines["film2"]["made_with"]["motion_bucket_id"] == 60
    assert summary["unet_calls_per_video"] == 4
    assert summary["seconds"] > 0
    assert summary["versions"].keys() == {"trfpp", "torch", "diffusers", "peft"}
    assert summary["settings"]["sampler.num_inference_steps"] == 2


def test_nothing_is_measured_of_a_frame_that_is_not_shown(settings, world, make_patch, tmp_path):
    """A loop is made of the first frame alone."""
    calibration = {
        "clips": 40, "nearest": (-7.0, -7.0), "farthest": (5.0, 0.0), "way": (1.0, 0.1, 0.0), "way_explained": 0.5,
        "fps": (2.0, 0.0, 0.0), "fps_explained": 0.0,
    }  # fmt: skip
    told = {
        "patches": [make_patch(calibration=calibration)],
        "sampler": SMALL.model_copy(update={"motion_bucket_id": "auto", "num_frames": FRAMES}),
    }
    shown, looped = (cases_of(settings(**told, loop=loop))[0].settings.motion_bucket_id for loop in (False, True))
    lines = [json.loads(line) for line in world[0].read_text().splitlines()]
    closed = tmp_path / "closed.jsonl"
    for line in lines:
        line |= {name: str(world[0].parent / line[name]) for name in ("start", "truth")}
        line["end"] = line["start"]
    closed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert looped == cases_of(settings(**told, data=closed))[0].settings.motion_bucket_id < shown


def test_batches_and_neighbours_change_nothing(settings, tmp_path):
    evaluate(settings(batch=4, output=tmp_path / "four"))
    evaluate(settings(batch=3, output=tmp_path / "three"))
    evaluate(settings(batch=1, output=tmp_path / "one", pairs=2))
    four, three, one = (rows(tmp_path / name) for name in ("four", "three", "one"))
    assert set(one) == {"film0", "film1"}
    for other in (three, one):
        for name, row in other.items():
            for metric in ("inner_psnr", "inner_ssim", "motion_ratio", "disagreement"):
                # Optical flow in what an untrained model makes magnifies the rounding of its pixels.
                rel = 2e-2 if metric == "motion_ratio" else 2e-3
                assert row[metric] == pytest.approx(four[name][metric], rel=rel)
            assert row["made_with"] == four[name]["made_with"]
    assert len({row["made_with"]["seed"] for row in four.values()}) == 4


def test_pairs_of_several_shapes_are_measured_each_at_its_own(settings, tmp_path):
    """A film as it is, tall, and short, in turn: the wide and the short one are not batched together."""
    (tmp_path / "films").mkdir()
    write_world(tmp_path / "films", "linear", count=4, seed=1, num_frames=6, side=64)
    films = {}
    for n in range(4):
        frames = open_video(tmp_path / "films" / f"linear-{n:05d}.mp4", 1).read(range(6))
        films[f"film{n}"] = (frames[:, 16:48], frames[:, :, 16:48], frames[:4, 16:48], frames[:, 16:48])[n]
    manifest = write_pairs(tmp_path / "pairs", films)
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    sized = [{**row, "height": film.shape[1], "width": film.shape[2]} for row, film in zip(lines, films.values())]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in sized))
    sampler = SamplerOverrides(num_inference_steps=2)
    summary = evaluate(settings(data=manifest, sampler=sampler, batch=4, save_videos=True))
    assert summary["pairs"] == 4
    found = rows(tmp_path / "out")
    for name, film in films.items():
        made = found[name]["made_with"]
        assert (made["num_frames"], made["height"], made["width"]) == film.shape[:3]
        assert open_video(tmp_path / "out" / "videos" / f"{name}.mp4", 1).size == film.shape[2:0:-1]
    alone = settings(data=manifest, sampler=sampler, batch=1, output=tmp_path / "alone")
    evaluate(alone)
    for name, row in rows(alone.output).items():
        assert row["inner_psnr"] == pytest.approx(found[name]["inner_psnr"], rel=2e-3)
    told = settings(data=manifest, sampler=SMALL.model_copy(update={"width": 48}), pairs=2, output=tmp_path / "told")
    evaluate(told)
    assert {(row["made_with"]["height"], row["made_with"]["width"]) for row in rows(told.output).values()} == {(32, 48)}
    evaluate(settings(data=manifest, baseline="cross_fade", output=tmp_path / "fade"))
    assert {name: row["made_with"]["height"] for name, row in rows(tmp_path / "fade").items()} == {
        name: film.shape[1] for name, film in films.items()
    }


def test_an_evaluation_goes_on_where_it_stopped(settings, monkeypatch):
    measure, measured = evaluating.measure, []

    def interrupted(*args, **kwargs):
        measured.append(1)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(evaluating, "measure", interrupted)
    sampler = SMALL.model_copy(update={"sampler": "trf"})
    config = settings(batch=1, sampler=sampler)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    there = rows(config.output)
    assert list(there) == ["film0", "film1"]
    recipe = json.loads((config.output / "recipe.json").read_text())
    del recipe["sampler.min_guidance_sigma"]  # as one from before there was such a setting
    (config.output / "recipe.json").write_text(json.dumps(recipe))
    summary = evaluate(config)
    assert len(measured) == 5
    assert summary["pairs"] == 4
    assert {name: rows(config.output)[name] for name in there} == there
    # Once more, and there is nothing left to do.
    assert evaluate(config)["metrics"] == summary["metrics"]
    assert len(measured) == 5
    assert evaluate(settings(pairs=2, sampler=sampler))["pairs"] == 2
    assert len(rows(config.output)) == 4


def test_the_sheet_has_the_pairs_of_the_go_that_had_more(settings, monkeypatch):
    measure, left = evaluating.measure, []

    def shown(before_interrupt):
        """How wide the sheet is if so many pairs are measured, and the rest when it goes on."""
        left[:] = [1] * before_interrupt
        config = settings(batch=1, baseline="cross_fade", output=settings().output / str(before_interrupt))
        with monkeypatch.context() as stopped:
            stopped.setattr(evaluating, "measure", interrupting)
            with pytest.raises(KeyboardInterrupt):
                evaluate(config)
        evaluate(config)
        return Image.open(config.output / "sheet.png").width

    def interrupting(*args, **kwargs):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return measure(*args, **kwargs)

    assert shown(1) == shown(3) > shown(2)


def test_which_of_several_devices_decides_nothing(settings):
    evaluate(settings(pairs=1, device="cpu:0"))
    assert evaluate(settings(pairs=2))["settings"]["device"] == "cpu"
    assert len(rows(settings().output)) == 2


def test_other_settings_need_another_folder(settings, make_patch):
    config = settings(pairs=1)
    evaluate(config)
    before = rows(config.output)
    for change, name in (
        ({"seed": 1}, "seed"),
        ({"sampler": SMALL.model_copy(update={"jump_length": 1})}, "sampler.jump"),
    ):
        with pytest.raises(ValueError, match=f"measured with another {name}"):
            evaluate(settings(pairs=1, **change))
    assert rows(config.output) == before
    evaluate(settings(pairs=1, seed=1, overwrite=True))
    assert rows(config.output) != before
    (config.output / "recipe.json").unlink()
    with pytest.raises(ValueError, match="something else than an evaluation"):
        evaluate(settings(pairs=1, overwrite=True))


def test_a_patch_changes_the_numbers_and_is_recorded(settings, make_patch, tmp_path):
    patch = make_patch(height=32, width=32)
    none, some = (
        evaluate(settings(pairs=2, patches=[patch], scales=[scale], output=tmp_path / str(scale)))
        for scale in (0.0, 1.0)
    )
    assert none["metrics"]["inner_psnr"] != some["metrics"]["inner_psnr"]
    assert some["settings"]["patches"] == [str(patch)]
    compared = compare(tmp_path / "0.0", tmp_path / "1.0")
    assert compared.changed == ["scales"]
    assert compared.metrics["inner_psnr"].pairs == 2


@pytest.mark.parametrize("name", ["cross_fade", "flow_warp"])
def test_a_baseline_needs_no_model_and_keeps_its_bounds(name, settings, world):
    summary = evaluate(settings(baseline=name, truth=world[1]))
    assert summary["metrics"]["bound_psnr"]["mean"] == 100
    assert summary["metrics"]["track_percent"]["mean"] > 5
    assert summary["settings"]["sampler.height"] == 32  # that of the truth
    assert "disagreement" not in summary["metrics"]


def test_a_loop_has_its_first_frame_at_both_ends(settings, tmp_path):
    summary = evaluate(settings(loop=True))
    assert {"seam_gap", "seam_jump"} <= summary["metrics"].keys()
    still = evaluate(settings(loop=True, baseline="cross_fade", output=tmp_path / "still"))
    assert still["metrics"]["motion_ratio"]["mean"] == 0
    assert "seam_gap" not in still["metrics"]  # a still has none


def test_reconstruction_is_the_vaes_own(settings, world, tiny_model):
    config = settings(reconstruct=True, pairs=1, save_videos=False)
    evaluate(config)
    vae = load_component(tiny_model, "vae")
    truth = np.stack([np.asarray(Image.open(f)) for f in sorted((world[0].parent / "film0" / "truth").iterdir())])
    pixels = to_tensor(truth)
    copy = vae.decode(vae.encode(pixels).latent_dist.mode(), num_frames=FRAMES).sample
    assert rows(config.output)["film0"]["inner_psnr"] == pytest.approx(inner_psnr(to_uint8(copy), truth), abs=0.01)


def test_unreadable_pairs_are_reported_and_the_rest_goes_on(settings, tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (2, FRAMES, 32, 32, 3), dtype=np.uint8)
    manifest = write_pairs(tmp_path / "pairs", dict(zip(("bad", "good"), frames)))
    (tmp_path / "pairs" / "bad" / "truth" / "00001.png").write_bytes(b"")
    config = settings(data=manifest)
    with pytest.raises(ValueError, match=r"1 of 2 pairs could not be measured:\n  bad: .*00001\.png: not a readable"):
        evaluate(config)
    assert list(rows(config.output)) == ["good"]
    assert json.loads((config.output / "summary.json").read_text())["pairs"] == 1


def test_what_cannot_be_seen_is_not_measured_and_the_rest_goes_on(settings, make_patch, tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (2, FRAMES, 32, 32, 3), dtype=np.uint8)
    manifest = write_pairs(tmp_path / "pairs", dict(zip(("bad", "good"), frames)))
    (tmp_path / "pairs" / "bad" / "start.png").write_bytes(b"")
    patch = make_patch(calibration=CALIBRATION)
    auto = SMALL.model_copy(update={"motion_bucket_id": "auto"})
    for changes in ({"patches": [patch], "sampler": auto}, {"baseline": "cross_fade"}):
        config = settings(data=manifest, output=tmp_path / str(len(changes)), **changes)
        with pytest.raises(ValueError, match=r"1 of 2 pairs could not be measured:\n  bad: .*start\.png"):
            evaluate(config)
        assert list(rows(config.output)) == ["good"]


def test_a_later_pair_that_was_told_otherwise_is_noticed(settings, tmp_path):
    """Although the first pair's fps, which stands for all in the recipe, is the same."""
    evaluate(settings())
    told = SMALL.model_copy(update={"fps": 5.0})
    with pytest.raises(ValueError, match="measured with another fps"):
        evaluate(settings(sampler=told))
    evaluate(settings(sampler=told, output=tmp_path / "told"))
    assert compare(tmp_path / "out", tmp_path / "told").changed == ["sampler.fps"]


def test_other_footage_by_the_same_name_is_not_compared(settings, world, tmp_path):
    evaluate(settings(baseline="cross_fade"))
    film = open_video(world[1].parent / "linear-00003.mp4", 1).read(range(FRAMES))
    other = write_pairs(tmp_path / "pairs", {"film0": film})
    evaluate(settings(baseline="cross_fade", data=other, output=tmp_path / "other"))
    with pytest.raises(ValueError, match=r"pair film0 of .* has other frames than that of"):
        compare(tmp_path / "out", tmp_path / "other")


def test_pairs_of_one_film_stand_together(settings, world, tmp_path):
    films = {f"part{n}": open_video(world[1].parent / f"linear-{n:05d}.mp4", 1).read(range(FRAMES)) for n in range(3)}
    manifest = write_pairs(tmp_path / "pairs", films, video="one.mp4")
    summary = evaluate(settings(baseline="cross_fade", data=manifest))
    assert summary["metrics"]["inner_psnr"]["pairs"] == 3
    assert summary["metrics"]["inner_psnr"]["low"] is None  # one film says nothing of others


def test_what_cannot_be_measured_is_said_before_weights_are_loaded(settings, world, tmp_path):
    with pytest.raises(ValueError, match=r"8 frames would be made, but its truth has 4; give sampler\.num_frames=4"):
        evaluate(settings(sampler=SMALL.model_copy(update={"num_frames": 8})))
    with pytest.raises(ValueError, match=r"holds no held-out pairs \(pairs/pairs\.jsonl\); give a dataset"):
        evaluate(settings(data=tmp_path))
    with pytest.raises(ValueError, match="no such dataset or manifest"):
        evaluate(settings(data=tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"truth='.*none\.jsonl': cannot be read"):
        evaluate(settings(truth=tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="no ground truth as"):
        evaluate(settings(truth=world[0]))
    other = write_world(tmp_path / "films", "linear", count=1, seed=1, num_frames=FRAMES, side=32, first=9)
    with pytest.raises(ValueError, match=r"pair film0: its video 'linear-00000.mp4' is not in truth="):
        evaluate(settings(truth=other))
    longer = write_world(tmp_path / "longer", "linear", count=4, seed=1, num_frames=6, side=32)
    with pytest.raises(ValueError, match="pair film0 has 4 frames and its film 6"):
        evaluate(settings(truth=longer))
    with pytest.raises(ValueError, match="a video of 48x32 has not the square frame of its film"):
        evaluate(settings(truth=world[1], sampler=SMALL.model_copy(update={"width": 48})))
    bare = world[0].parent / "bare.jsonl"
    bare.write_text('{"id": "film0", "start": "film0/start.png", "end": "film0/end.png"}\n')
    with pytest.raises(ValueError, match="pair film0 has no truth"):
        evaluate(settings(data=bare))
    with pytest.raises(ValueError, match="no model: give model="):
        evaluate(settings(model="", sampler=SMALL))
    assert not settings().output.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"baseline": "cross_fade", "model": "m"}, "a baseline needs no model"),
        ({"baseline": "cross_fade", "reconstruct": True}, "a baseline needs no model"),
        ({"baseline": "cross_fade", "sampler": {"motion_bucket_id": "auto"}}, "is for what is sampled"),
        ({"reconstruct": True, "patches": ["p"]}, "which no patch changes"),
        ({"scales": [1.0, 2.0]}, "2 scales for 0 patches"),
    ],
)
def test_settings_that_do_not_go_together(change, said):
    with pytest.raises(ValueError, match=said):
        EvaluateConfig.model_validate_json(json.dumps({"data": "d", "output": "o", **change}))


def test_two_evaluations_are_compared_pair_by_pair(settings, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    evaluate(settings(baseline="cross_fade", output=a, pairs=3))
    evaluate(settings(baseline="flow_warp", output=b))
    found = compare(a, b)
    first, second = rows(a), rows(b)
    one = found.metrics["inner_psnr"]
    steps = [second[name]["inner_psnr"] - first[name]["inner_psnr"] for name in first]
    assert one.contrast.value == pytest.approx(np.mean(steps))
    assert min(steps) - 1e-9 <= one.contrast.low < one.contrast.value < one.contrast.high <= max(steps) + 1e-9
    assert (one.pairs, found.left_out, found.changed) == (3, 1, ["baseline"])
    assert "1 pairs are in one of the two only" in str(found)
    assert str(found).splitlines()[0].split() == ["metric", "pairs", "a", "b", "b", "-", "a", "[95", "%]"]
    ratio = compare(a, b, "ratio").metrics["inner_psnr"].contrast.value
    assert ratio == pytest.approx(one.b.value / one.a.value)
    assert compare(a, a).metrics["inner_psnr"].contrast == (0, 0, 0)

    evaluate(settings(baseline="flow_warp", output=tmp_path / "c", sampler=SamplerOverrides(height=16, width=16)))
    with pytest.raises(ValueError, match=r"made as .*32.*16.*measure both alike"):
        compare(a, tmp_path / "c")
    with pytest.raises(ValueError, match="no evaluation there"):
        compare(a, tmp_path)
