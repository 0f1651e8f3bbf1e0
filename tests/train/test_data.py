"""Which clip and which draws a sample has: seeds, order, ranks, dropout, and what the model is told of each clip."""

import pytest
import torch

from trfpp.data_prep.dataset import load_clips
from trfpp.data_prep.latents import find_cache, read_clip
from trfpp.data_prep.shapes import Shape
from trfpp.train.data import CachedSamples, Clip, RankOrder, loader

FIELDS = ("latents", "noise", "sigma", "condition", "embedding", "added_time_ids", "backward")


@pytest.fixture
def samples(dataset):
    def make(seed=0, dropout=0.0, fps=None, buckets=None, direction="forward"):
        rows = load_clips(dataset, "train")
        shape = Shape(4, 32, 32)
        clips = [
            Clip(row["clip_id"], fps[i] if fps else row["fps"], buckets[i] if buckets else row["motion_bucket"], shape)
            for i, row in enumerate(rows)
        ]
        return CachedSamples(
            clips, find_cache(dataset, "miniature"), scaling_factor=0.18215, sigma_mean=0.7, sigma_std=1.6,
            conditioning_dropout=dropout, seed=seed, direction=direction, per_step=3,
        )  # fmt: skip

    return make


def same(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


def test_a_sample_is_a_function_of_seed_and_number(samples):
    assert same(samples()[3], samples()[3])
    assert not torch.equal(samples()[3].noise, samples()[4].noise)
    assert not torch.equal(samples()[3].noise, samples(seed=1)[3].noise)
    torch.manual_seed(5)
    one = samples()[3]
    torch.manual_seed(6)
    assert same(one, samples()[3])


def test_an_epoch_visits_every_clip_once_in_an_order_of_its_own(samples):
    source = samples()
    count = len(source.clips)
    epochs = [[source.clip_of(epoch * count + i).clip_id for i in range(count)] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(clip.clip_id for clip in source.clips) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_any_split_between_processes_sees_the_same_global_batches(processes, accumulation):
    def batches(start, stop):
        ranks = [
            list(
                RankOrder(
                    start=start, stop=stop, batch_size=3, accumulation=accumulation, rank=rank, num_processes=processes
                )
            )
            for rank in range(processes)
        ]
        per_step = 3 * accumulation
        return [
            sorted(n for rank in ranks for n in rank[i * per_step : (i + 1) * per_step]) for i in range(stop - start)
        ]

    assert batches(0, 3) == [list(range(step * 12, step * 12 + 12)) for step in range(3)]
    assert batches(2, 5) == [list(range(step * 12, step * 12 + 12)) for step in range(2, 5)]


def test_ranks_share_neither_clips_nor_noise(samples):
    source = samples()
    orders = [RankOrder(start=0, stop=2, batch_size=1, accumulation=1, rank=r, num_processes=2) for r in range(2)]
    clips = [[source.clip_of(n).clip_id for n in order] for order in orders]
    assert len(set(clips[0] + clips[1])) == 4 <= len(source.clips)
    one, other = ([source[n] for n in order] for order in orders)
    assert not any(torch.equal(a.noise, b.noise) for a in one for b in other)
    assert not any(torch.equal(a.sigma, b.sigma) for a in one for b in other)


def test_workers_change_nothing(samples):
    order = RankOrder(start=0, stop=3, batch_size=2, accumulation=1, rank=0, num_processes=1)
    for one, other in zip(loader(samples(), order, 0), loader(samples(), order, 2)):
        assert same(one, other)


def test_latents_are_drawn_from_the_scaled_posterior(samples, dataset):
    source = samples()
    cached = read_clip(find_cache(dataset, "miniature"), source.clip_of(0).clip_id)
    z = (source[0].latents / 0.18215 - cached["mean"]) / cached["std"]
    assert float(z.mean()) == pytest.approx(0, abs=0.1)
    assert float(z.std()) == pytest.approx(1, abs=0.1)


def test_condition_is_one_of_the_augmentations_and_its_own_level_is_told(samples, dataset):
    source = samples()
    told = set()
    for n in range(12):
        cached = read_clip(find_cache(dataset, "miniature"), source.clip_of(n).clip_id)
        sample = source[n]
        level = sample.added_time_ids[2]
        which = (cached["start.noise_aug"] == level).nonzero()
        assert len(which) == 1
        assert torch.equal(sample.condition, cached["start.condition"][which[0, 0]])
        assert torch.equal(sample.embedding, cached["start.embedding"])
        told.add(float(level))
    assert len(told) > 6


def test_every_clip_is_told_with_its_own_fps_less_one_and_its_own_motion(samples):
    count = len(samples().clips)
    source = samples(fps=[10.0 + i for i in range(count)], buckets=[float(i) for i in range(count)])
    for n in range(count):
        clip = source.clip_of(n)
        assert source[n].added_time_ids[:2].tolist() == [clip.fps - 1, clip.motion_bucket]


def test_a_backward_sample_is_the_reversed_film_from_its_last_frame(samples, dataset):
    forward, backward = samples(), samples(direction="backward")
    for n in range(6):
        one, other = forward[n], backward[n]
        cached = read_clip(find_cache(dataset, "miniature"), forward.clip_of(n).clip_id)
        assert torch.equal(other.latents, one.latents.flip(0))
        assert torch.equal(other.noise, one.noise.flip(0))
        assert not torch.equal(other.latents, one.latents)
        assert torch.equal(other.sigma, one.sigma)
        assert torch.equal(other.added_time_ids[:2], one.added_time_ids[:2])
        which = (cached["end.noise_aug"] == other.added_time_ids[2]).nonzero()
        assert len(which) == 1
        assert torch.equal(other.condition, cached["end.condition"][which[0, 0]])
        assert torch.equal(other.embedding, cached["end.embedding"])
        assert (bool(one.backward), bool(other.backward)) == (False, True)


def test_both_ways_is_a_batch_of_the_one_and_then_the_other(samples):
    order = RankOrder(start=0, stop=2, batch_size=2, accumulation=1, rank=0, num_processes=1)
    both, forward, backward = (
        list(loader(samples(direction=way, dropout=0.5), order, 0)) for way in ("both", "forward", "backward")
    )
    for rows, one, other in zip(both, forward, backward):
        for name in FIELDS:
            assert torch.equal(getattr(rows, name), torch.cat([getattr(one, name), getattr(other, name)]))
        assert rows.backward.tolist() == [False, False, True, True]


def test_either_way_is_a_fair_coin_of_the_sample_that_moves_no_other_draw(samples):
    either, forward, backward = (samples(direction=way, dropout=0.3) for way in ("either", "forward", "backward"))
    coins = []
    for n in range(200):
        sample = either[n]
        coins.append(bool(sample.backward))
        assert same(sample, (backward if sample.backward else forward)[n])
        assert same(sample, either[n])
    assert sum(coins) / len(coins) == pytest.approx(0.5, abs=0.1)
    other = samples(direction="either", seed=1)
    assert coins != [bool(other[n].backward) for n in range(200)]


def test_both_conditions_are_dropped_together_at_the_given_rate(samples):
    source = samples(dropout=0.3)
    dropped = []
    for n in range(200):
        sample = source[n]
        assert (float(sample.condition.abs().max()) == 0) == (float(sample.embedding.abs().max()) == 0)
        dropped.append(float(sample.embedding.abs().max()) == 0)
    assert sum(dropped) / len(dropped) == pytest.approx(0.3, abs=0.1)
