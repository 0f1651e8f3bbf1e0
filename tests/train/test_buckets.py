"""Clips of several shapes in one run: whose turn each step is, the order within a bucket, and whole mixed trainings."""

import hashlib
import json
import sys
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trfpp.data_prep.dataset import load_clips, prepare
from trfpp.data_prep.latents import find_cache, read_clip
from trfpp.data_prep.procedural import film
from trfpp.data_prep.shapes import Shape, shapes_of
from trfpp.data_prep.video import open_video
from trfpp.data_prep.writing import write_video
from trfpp.train import setup
from trfpp.train.binding import binding_settings
from trfpp.train.buckets import buckets_of, schedule
from trfpp.train.data import CachedSamples, Clip, RankOrder
from trfpp.train.full import Batches
from trfpp.train.objective import Objective
from trfpp.train.plan import make_plan
from trfpp.train.setup import make_samples, make_validator
from trfpp.trf.patch import read_card
from trfpp.trf.seeds import derived_seed

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
LANDSCAPE, PORTRAIT, SHORT = Shape(12, 32, 64), Shape(12, 64, 32), Shape(8, 32, 64)
COUNTS = st.lists(st.integers(1, 30), min_size=1, max_size=6).map(tuple)


# The schedule --------------------------------------------------------------------------------------------------------


@given(counts=COUNTS, cycles=st.integers(1, 2))
def test_every_bucket_has_its_share_after_every_step(counts, cycles):
    turns, total, given_to = schedule(counts), sum(counts), Counter()
    most = 0 if len(counts) == 1 else 1 - Fraction(1, 2 * len(counts) - 2)
    for step in range(cycles * total):
        bucket, earlier = turns.at(step)
        assert earlier == given_to[bucket]
        given_to[bucket] += 1
        for own, count in enumerate(counts):
            assert abs(given_to[own] - Fraction((step + 1) * count, total)) <= most
    assert [given_to[own] for own in range(len(counts))] == [cycles * count for count in counts]


@given(counts=COUNTS, steps=st.integers(0, 400))
def test_totals_are_counted_turns(counts, steps):
    turns = Counter(schedule(counts).at(step).bucket for step in range(steps))
    assert schedule(counts).totals(steps) == [turns[own] for own in range(len(counts))]


def test_one_in_ten_comes_in_the_middle():
    assert [schedule((9, 1)).at(step).bucket for step in range(10)].index(1) in (4, 5)
    assert [schedule((2, 2)).at(step).bucket for step in range(6)] == [0, 1, 0, 1, 0, 1]


def test_buckets_keep_the_datasets_order():
    buckets = buckets_of([SHORT, LANDSCAPE, PORTRAIT, LANDSCAPE])
    assert [(bucket.shape, bucket.clips) for bucket in buckets] == [(LANDSCAPE, [1, 3]), (PORTRAIT, [2]), (SHORT, [0])]


# The order of clips --------------------------------------------------------------------------------------------------


def samples_of(counts, per_step, seed=0):
    """Samples of so many clips of each of several shapes, mixed; nothing is read."""
    shapes = [Shape(4, 32, 8 * (1 + own)) for own, count in enumerate(counts) for _ in range(count)]
    mixed = torch.randperm(len(shapes), generator=torch.Generator().manual_seed(7)).tolist()
    clips = [Clip(f"clip{place}", 8.0, 100.0, shapes[place]) for place in mixed]
    return CachedSamples(
        clips, None, scaling_factor=1.0, sigma_mean=0.7, sigma_std=1.6, conditioning_dropout=0.0, seed=seed,
        per_step=per_step,
    )  # fmt: skip


@settings(deadline=None)
@given(counts=st.lists(st.integers(1, 8), min_size=1, max_size=4), per_step=st.integers(1, 5), steps=st.integers(1, 30))
def test_a_step_has_one_shape_and_no_clip_comes_again_before_the_others(counts, per_step, steps):
    samples = samples_of(counts, per_step)
    seen = {}
    for step in range(steps):
        clips = [samples.clip_of(n) for n in range(step * per_step, (step + 1) * per_step)]
        assert len({clip.shape for clip in clips}) == 1
        seen.setdefault(clips[0].shape, []).extend(clip.clip_id for clip in clips)
    sizes = Counter(clip.shape for clip in samples.clips)
    for shape, names in seen.items():
        for first in range(0, len(names), sizes[shape]):
            epoch = names[first : first + sizes[shape]]
            assert len(set(epoch)) == len(epoch)


def test_epochs_of_a_bucket_differ_and_so_do_buckets_and_seeds():
    samples, other = samples_of([6, 6], 6), samples_of([6, 6], 6, seed=1)

    def order(source, step):
        return [
            source.buckets[step % 2].clips.index(source.clips.index(source.clip_of(6 * step + i))) for i in range(6)
        ]

    orders = [tuple(order(source, step)) for source in (samples, other) for step in range(6)]
    assert len(set(orders)) > 10


def test_one_shape_keeps_the_order_there_has_always_been():
    samples = samples_of([5], 3, seed=4)
    for n in range(23):
        generator = torch.Generator().manual_seed(derived_seed(4, "order", n // 5))
        assert samples.clip_of(n) == samples.clips[int(torch.randperm(5, generator=generator)[n % 5])]


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("start", [0, 3])
def test_any_split_and_any_start_see_the_same_steps(processes, accumulation, start):
    samples = samples_of([7, 4, 1], 8)
    ranks = [
        list(
            RankOrder(start=start, stop=9, batch_size=2, accumulation=accumulation, rank=rank, num_processes=processes)
        )
        for rank in range(processes)
    ]
    mine = 2 * accumulation
    for step in range(start, 9):
        numbers = sorted(n for rank in ranks for n in rank[(step - start) * mine : (step - start + 1) * mine])
        assert numbers == list(range(step * 8, step * 8 + 8))
        assert {samples.clip_of(n).shape for n in numbers} == {samples.clip_of(step * 8).shape}


# Whole runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def mixed(tmp_path_factory, cached_dataset):
    """A dataset of clips of 12 and of 8 frames, landscape and portrait, cached for the miniature."""
    root = tmp_path_factory.mktemp("mixed")
    (root / "videos").mkdir()
    for number in range(5):
        shot = film("linear", 0, number, 26 if number < 3 else 10, 64)
        frames = shot.frames[:, :, 16:48] if number == 2 else shot.frames[:, 16:48]
        write_video(root / "videos" / f"{number}.mp4", frames, shot.fps)
    shapes = {"num_frames": [12, 8], "sizes": ["64x32", "32x64"]}
    return cached_dataset(root / "videos", root / "data", holdout=0.3, cut_threshold=255, **shapes)


@pytest.fixture
def mixed_config(config, mixed):
    def make(name="run", **changes):
        return config(name, data=mixed, **changes)

    return make


def weights(patch):
    return load_file(patch / "adapter_model.safetensors")


@pytest.fixture
def shapes_trained(monkeypatch):
    """The shapes of the batches that are trained on, in their order."""
    seen, real = [], Objective.losses

    def watch(self, model, unet, batch, step):
        seen.append(tuple(batch.latents.shape))
        return real(self, model, unet, batch, step)

    monkeypatch.setattr(Objective, "losses", watch)
    return seen


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Kept between the tests below: the weights of one uninterrupted run."""
    return {}


@pytest.fixture
def uninterrupted(reference, mixed_config, train_here):
    if not reference:
        reference.update(weights(train_here(mixed_config("uninterrupted", gradient_accumulation=2))))
    return reference


def test_the_dataset_is_mixed_and_so_is_its_cache(mixed):
    rows = load_clips(mixed)
    assert [(bucket.shape, len(bucket.clips)) for bucket in buckets_of(shapes_of(rows))] == [
        (LANDSCAPE, 3), (SHORT, 2), (PORTRAIT, 1),
    ]  # fmt: skip
    for row, shape in zip(rows, shapes_of(rows)):
        cached = read_clip(find_cache(mixed, "miniature"), row["clip_id"])
        assert cached["mean"].shape == (shape.num_frames, 16, shape.height // 8, shape.width // 8)
        assert cached["end.condition"].shape[-2:] == cached["mean"].shape[-2:]


def test_the_plan_tells_the_buckets_and_the_card_the_largest(mixed_config, train_here, shapes_trained):
    run = mixed_config(batch_size=2, steps=7)
    plan = make_plan(run, 1)
    assert "6 for training, 2 held out; of 3 shapes" in plan.text
    assert [line for line in plan.text.splitlines() if line.startswith("bucket")] == [
        "bucket       12 frames of 64x32: 3 clips, 4 of 7 steps",
        "bucket       8 frames of 64x32: 2 clips, 2 of 7 steps",
        "bucket       12 frames of 32x64: 1 clips, 1 of 7 steps",
    ]
    assert "32x64: 1 clips, 0 of 1 steps: NONE IN THIS RUN" in make_plan(mixed_config(steps=1), 1).text
    card = read_card(train_here(run))
    assert (card.num_frames, card.height, card.width) == LANDSCAPE
    assert card.motion.clips == 6
    wide, short, tall = (2, 12, 16, 4, 8), (2, 8, 16, 4, 8), (2, 12, 16, 8, 4)
    order = [(wide, short, tall)[schedule((3, 2, 1)).at(step).bucket] for step in range(7)]
    assert shapes_trained == order
    assert set(order) == {wide, short, tall}


def test_a_mixed_run_goes_on_to_the_bit(mixed_config, train_here, uninterrupted):
    resumed = mixed_config("resumed", gradient_accumulation=2, steps=3)
    train_here(resumed)
    again = weights(train_here(resumed.model_copy(update={"steps": 6})))
    assert all(torch.equal(again[key], uninterrupted[key]) for key in uninterrupted)
    assert all(float(value.abs().max()) > 0 for key, value in again.items() if "lora_B" in key)


def test_a_mixed_run_goes_on_in_two_processes(mixed_config, train_here, train_elsewhere, uninterrupted):
    train_here(mixed_config("moved", gradient_accumulation=2, steps=2))
    run = mixed_config("moved", steps=6)
    process = train_elsewhere(run, TORCHRUN, ACCELERATE_USE_CPU="true")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "resumed from" in out
    moved = weights(run.output / "patch")
    apart = sum(float((moved[key] - uninterrupted[key]).square().sum()) for key in moved)
    assert (apart / sum(float(value.square().sum()) for value in uninterrupted.values())) ** 0.5 <= 1e-5


@pytest.mark.parametrize(
    "objective", [{"fusion": 0.5, "alternate_directions": True}, {"fusion": 0.5, "rotated_attention": True}]
)
def test_both_directions_train_on_every_shape(mixed_config, train_here, shapes_trained, objective):
    patch = train_here(mixed_config(direction="both", objective=objective, steps=4))
    assert len(set(shapes_trained)) == 3
    assert read_card(patch).metrics["train loss_fused"] > 0


def test_full_fine_tuning_has_the_same_batches(mixed_config):
    run = mixed_config(direction="both", batch_size=2)
    cache = find_cache(run.data, run.model)
    batches = Batches(run, cache, "forward", torch.device("cpu"))
    samples = make_samples(run, cache, "train", per_step=2)
    for step in range(6):
        rows = [samples.sample(n, False) for n in (2 * step, 2 * step + 1)]
        assert torch.equal(batches(step).latents, torch.stack([row.latents for row in rows]))


def test_held_out_pairs_are_validated_each_at_its_own_shape(mixed_config, train_here):
    run = mixed_config(steps=1, validation={"every": 1, "pairs": 2, "num_inference_steps": 2})
    card = read_card(train_here(run))
    assert {"validation loss", "validation inner_psnr"} <= card.metrics.keys()
    shapes = dict(zip(load_clips(run.data, "validation")["clip_id"], shapes_of(load_clips(run.data, "validation"))))
    assert set(shapes.values()) == {LANDSCAPE, PORTRAIT}
    log = EventAccumulator(str(run.output / "log")).Reload()
    for name, shape in shapes.items():
        video = log.Images(f"validation/{name}/video")[-1]
        assert (video.height, video.width) == (2 * shape.height, shape.width)
        folder = run.output / "validation" / "step-000001"
        assert Image.open(folder / f"{name}.png").size == (7 * shape.width, 2 * shape.height)
        assert open_video(folder / f"{name}.mp4", 1).size == (shape.width, 2 * shape.height)


def test_pairs_to_validate_are_of_every_shape(mixed_config, mixed):
    """The training clips, taken for held-out ones: the first three are of two shapes."""
    run = mixed_config(validation={"pairs": 3})
    card = SimpleNamespace(direction="forward", rotated_attention=False)
    real, setup.load_clips = setup.load_clips, lambda folder, split="train": load_clips(folder, "train")
    try:
        chosen = make_validator(run, find_cache(mixed, run.model), card, torch.float32, torch.device("cpu")).clips
    finally:
        setup.load_clips = real
    assert {Shape(len(clip["frame_indices"]), clip["height"], clip["width"]) for clip in chosen} == {
        LANDSCAPE, PORTRAIT, SHORT,
    }  # fmt: skip


def test_every_size_must_be_one_the_vae_can_make(config, tmp_path):
    (tmp_path / "videos").mkdir()
    for number, frames in enumerate((np.zeros((5, 36, 64, 3), np.uint8), np.zeros((5, 64, 36, 3), np.uint8))):
        write_video(tmp_path / "videos" / f"{number}.mp4", frames, 8)
    prepare(
        tmp_path / "videos", tmp_path / "data", fps=None, num_frames=4, sizes=["64x32", "36x64"], holdout=0,
        progress=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"clips are 36x64, and this model's VAE needs multiples of 8"):
        make_plan(config(data=tmp_path / "data"), 1)


def test_lengths_bind_where_they_differ_and_runs_of_one_shape_are_bound_as_before(config, mixed_config, dataset):
    def digest(rows, *more):
        columns = [list(rows[name]) for name in ("clip_id", "fps", "motion_bucket", "height", "width")]
        return hashlib.sha256(json.dumps([*columns, *more]).encode()).hexdigest()[:12]

    alike, run = config(), mixed_config()
    assert binding_settings(alike, make_plan(alike, 1))["clips in data"] == digest(load_clips(dataset))
    rows = load_clips(run.data)
    lengths = [len(indices) for indices in rows["frame_indices"]]
    assert binding_settings(run, make_plan(run, 1))["clips in data"] == digest(rows, lengths)
