"""A long film seen through short ones: windows of the model's length from keyframes, and how they are mixed.

The model makes a film of F frames from a bound at its first frame. A film through K keyframes is seen by one window
from each keyframe to its future, which runs forward, and one to its past, which runs backward. Windows may pass the
next keyframe: what lies on both sides of it is then estimated in one piece, so that motion goes on through it. All of
this is layout, made before sampling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Level:
    """One film of a hierarchy, each of which fills in the one before: its frames are this one's keyframes."""

    times: tuple[int, ...]
    """Frames of the film that are keyframes, rising from 0."""
    frames: int
    """Of the film."""
    stride: float
    """Frames of the last level's film from one of this level's to the next, on average."""


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The windows of one direction on a film."""

    keyframes: tuple[int, ...]
    """Of each window, the number of the keyframe that it starts from."""
    frames: Tensor
    """`[K, F]`: frames of the film in a window, in the window's own order; int64."""
    weights: Tensor
    """`[K, F]`: share of the window in each of its frames, float32. Over both directions they sum to 1 at a frame."""

    total: int
    """Frames of the film, with those beyond its ends."""

    def to(self, device: torch.device) -> Windows:
        """The same on a device."""
        return replace(self, frames=self.frames.to(device), weights=self.weights.to(device))

    @cached_property
    def share(self) -> Tensor:
        """Share of all these windows in each frame of the film, `[1, total, 1, 1, 1]`."""
        return self._mixing.sum((1, 2)).view(1, -1, 1, 1, 1)

    def mix(self, estimates: Tensor) -> Tensor:
        """The weighted mean of the windows' estimates `[K, F, C, h, w]`, `[1, total, C, h, w]`; zero where none is."""
        # A product and no sum by index: on a GPU that would add in any order.
        mean = self._mixing / self.share.view(-1, 1, 1).clamp(min=torch.finfo(self.weights.dtype).tiny)
        return torch.einsum("nkf,kfchw->nchw", mean, estimates).unsqueeze(0)

    @cached_property
    def _mixing(self) -> Tensor:
        """`[total, K, F]`: weight of a window's frame in a frame of the film."""
        windows, places = (torch.arange(size, device=self.frames.device) for size in self.frames.shape)
        mixing = self.weights.new_zeros(self.total, *self.frames.shape)
        mixing[self.frames, windows[:, None], places] = self.weights
        return mixing


def levels_of(times: Sequence[int], frames: int, length: int, *, closed: bool) -> list[Level]:
    """The films to make, from the coarsest to the one that is asked for.

    Keyframes may be at most half a window apart, so that windows reach beyond their neighbours, or a whole one if there
    are but two. Where they are farther apart a film with fewer frames is made first, each segment of it with a
    whole number of steps.

    Args:
        times: frames of the film that are keyframes, rising from 0.
        frames: of the film; without an end that is its beginning again, if it is closed.
        length: F, frames of a window.
        closed: whether the film goes on from its last frame to its first.
    """
    ends = [*times, frames] if closed else list(times)
    gaps = [later - earlier for earlier, later in pairwise(ends)]
    reach = length - 1 if len(times) == 2 and not closed else length // 2
    if max(gaps) <= reach:
        return [Level(times=tuple(times), frames=frames, stride=1.0)]
    stride = min(math.ceil(max(gaps) / reach), length // 2)
    steps = [math.ceil(gap / stride) for gap in gaps]
    first = [sum(steps[:k]) for k in range(len(times))]
    coarser = levels_of(first, sum(steps) + (not closed), length, closed=closed)
    placed = [start + round(j * gap / n) for start, gap, n in zip(times, gaps, steps) for j in range(n)]
    placed += [] if closed else [times[-1]]
    longer = sum(gaps) / sum(steps)
    return [
        *(Level(times=one.times, frames=one.frames, stride=one.stride * longer) for one in coarser),
        Level(times=tuple(placed), frames=frames, stride=1.0),
    ]


def places_of(levels: Sequence[Level], *, closed: bool) -> list[Tensor]:
    """Where in the last film the frames of each film are, `[frames]`: 0 at its first frame, 1 at its last.

    A closed film's 1 is its first frame again.
    """
    film = levels[-1].frames
    places = [torch.arange(film) / (film - (not closed))]
    for finer in reversed(levels[1:]):  # its keyframes are the frames of the film before
        places.insert(0, places[0][list(finer.times)])
    return places


def starts_of(times: Sequence[int], frames: int, length: int, *, closed: bool) -> list[int]:
    """Numbers of the keyframes that windows start from: few, but no more than half a window apart where that can be.

    The first one is among them, and of an open film the last one.
    """
    starts = [0]
    ends = [*times, frames] if closed else list(times)
    for number, (here, after) in enumerate(pairwise(ends[1:]), start=1):
        if after - times[starts[-1]] > length // 2 and here > times[starts[-1]]:
            starts.append(number)
    return starts if closed else [*starts, len(times) - 1]


def windows_of(
    times: Sequence[int], frames: int, length: int, *, closed: bool
) -> tuple[Windows, Windows, tuple[int, int]]:
    """The windows of a film, forward ones and backward ones.

    A frame's weights fall with its distance d from a window's keyframe as 1 / d, and beyond the next keyframe that
    has windows linearly to nothing as well, so that no window ends abruptly. Between two keyframes these are TRF's
    linear weights; at a keyframe its own windows have all of the weight.

    Args:
        times: frames of the film that are keyframes, rising from 0.
        frames: of the film.
        length: F, frames of a window.
        closed: whether the film goes on from its last frame to its first.

    Returns:
        Forward windows, backward windows, and how many frames the film needs before its first and after its last one,
        which complete windows that look beyond its ends. The windows count frames from the first of those.
    """
    starts = starts_of(times, frames, length, closed=closed)
    at = [times[number] for number in starts]
    if closed:
        length = min(length, frames + 1)
        gaps = [later - earlier for earlier, later in pairwise([*at, at[0] + frames])]
        forward = list(zip(starts, at, gaps))
        backward = list(zip(starts, at, [gaps[-1], *gaps[:-1]]))
        before = after = 0
    else:
        gaps = [later - earlier for earlier, later in pairwise(at)]
        forward = list(zip(starts, at, gaps))
        backward = list(zip(starts[1:], at[1:], gaps))
        before = max(0, *(length - 1 - time for _, time, _ in backward))
        after = max(0, *(time + length - frames for _, time, _ in forward))
    total = before + frames + after
    distance = torch.arange(length)
    indices, raw = [], []
    for step, own in ((1, forward), (-1, backward)):
        place = torch.stack([before + time + step * distance for _, time, _ in own])
        indices.append(place % total if closed else place)
        raw.append(torch.stack([_falling(distance, gap) for _, _, gap in own]))
    shares = torch.zeros(total).index_add(0, torch.cat(indices).flatten(), torch.cat(raw).flatten())
    made = [
        Windows(keyframes=tuple(next(zip(*own))), frames=places, weights=weights / shares[places], total=total)
        for own, places, weights in zip((forward, backward), indices, raw)
    ]
    return made[0], made[1], (before, after)


def _falling(distance: Tensor, gap: int) -> Tensor:
    """Weights of a window by distance, before they are made to sum to 1; next to its keyframe nothing else counts."""
    beyond = (distance - gap).clamp(min=0) / max(1, len(distance) - gap)
    nothing_else = 1e12
    return torch.where(distance == 0, nothing_else, (1 - beyond) / distance.clamp(min=1))


def ramps_of(times: Sequence[int], frames: int, margin: tuple[int, int], *, closed: bool) -> Tensor:
    """Shares of the keyframes in each frame by linear interpolation, `[K, frames + margins]`, float32.

    They sum to 1 at a frame; before the first keyframe of an open film and after its last one they are constant.
    """
    place = torch.arange(-margin[0], frames + margin[1], dtype=torch.float32)
    around = [times[-1] - frames, *times, times[0] + frames] if closed else list(times)
    nodes = torch.tensor(around, dtype=torch.float32)
    if len(nodes) == 1:
        return torch.ones(1, len(place))
    place = place.clamp(nodes[0], nodes[-1])
    after = torch.searchsorted(nodes, place, right=True).clamp(1, len(nodes) - 1)
    share = (place - nodes[after - 1]) / (nodes[after] - nodes[after - 1])
    ramps = torch.zeros(len(times), len(place))
    numbers = torch.arange(len(place))
    shift = 1 if closed else 0
    for node, part in ((after - 1, 1 - share), (after, share)):
        ramps.index_put_(((node - shift) % len(times), numbers), part, accumulate=True)
    return ramps


def held(film: Tensor, frames: Tensor, latents: Tensor, ramps: Tensor) -> Tensor:
    """The film moved until its keyframes are in place, and the frames between them along with both.

    Args:
        film: `[B, N, C, h, w]`.
        frames: of the film that are keyframes, `[K]` int64.
        latents: the keyframes' own, `[B, K, C, h, w]`.
        ramps: share of each keyframe in each frame, `[K, N]`.
    """
    return film + torch.einsum("kn,bkchw->bnchw", ramps.to(film), latents - film[:, frames])
