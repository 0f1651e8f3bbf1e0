"""Tiles cover everything once, and fade into each other; decoded in tiles, frames are whole and whole ones are not cut."""

from itertools import pairwise

import pytest
import torch

from trfpp import TimeReversalFusionPipeline
from trfpp.trf.base import load_component
from trfpp.trf.tiles import in_tiles, tile_starts


@pytest.mark.parametrize(
    ("size", "tile", "overlap"), [(5, 8, 2), (8, 8, 2), (9, 8, 2), (50, 8, 2), (50, 8, 7), (51, 9, 0)]
)
def test_tiles_cover_a_side_and_overlap(size, tile, overlap):
    starts = tile_starts(size, tile, overlap)
    assert starts[0] == 0
    assert starts[-1] == max(0, size - tile)
    assert all(later - start <= tile - overlap for start, later in pairwise(starts))
    fewer = len(starts) - 1
    assert fewer == 0 or fewer * (tile - overlap) + overlap < size  # no tile too many


def test_what_acts_on_each_place_alone_is_not_changed():
    x = torch.randn(2, 3, 21, 34, generator=torch.Generator().manual_seed(0))

    def enlarged(part):
        return part.square().repeat_interleave(2, -1).repeat_interleave(2, -2)

    for tile, overlap in ((8, 2), (13, 12), (34, 5), (100, 10)):
        torch.testing.assert_close(in_tiles(enlarged, x, tile, overlap, 2), enlarged(x))


def test_tiles_of_unlike_tone_fade_linearly():
    tones = iter([0.0, 8.0])
    made = in_tiles(lambda part: part + next(tones), torch.zeros(1, 1, 4, 12), 8, 4, 1)
    assert made[0, 0, 0].tolist() == [0, 0, 0, 0, 1, 3, 5, 7, 8, 8, 8, 8]


def test_an_overlap_as_large_as_a_tile_is_refused():
    with pytest.raises(ValueError, match=r"tiles of 4 cannot overlap by 4"):
        tile_starts(9, 4, 4)


def test_frames_are_decoded_in_tiles(tiny_model):
    pipe = TimeReversalFusionPipeline(load_component(tiny_model, "vae"), None, None, None, None)
    latents = torch.randn(1, 5, 4, 16, 24, generator=torch.Generator().manual_seed(0))
    seen = []
    decode = pipe.vae.decode

    def watched(part, **more):
        seen.append(tuple(part.shape))
        return decode(part, **more)

    pipe.vae.decode = watched
    with torch.no_grad():
        whole = pipe.decode_latents(latents, 5)
        pipe.decode_tile_size = 24 * pipe.vae_scale_factor
        assert torch.equal(pipe.decode_latents(latents, 5), whole)
        seen.clear()
        pipe.decode_tile_size = 8 * pipe.vae_scale_factor
        tiled = pipe.decode_latents(latents, 5)
    assert set(seen) == {(5, 4, 8, 8)}
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)
    corner = slice(0, pipe.vae_scale_factor)
    alone = pipe.decode_latents(latents[..., :8, :8], 5)
    torch.testing.assert_close(tiled[..., corner, corner], alone[..., corner, corner])
