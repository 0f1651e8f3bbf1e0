"""A turntable with solids on it, seen by a camera that orbits: ray-cast, with perspective, occlusion and shading.

World axes: `y` up, the turntable's top at `y = 0` with radius 1. Azimuth counts from `x` towards `z`, in degrees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .canvas import Texture, draw_texture, dull, to_frames, vivid
from .film import Film, Pace, draw_fps, log_uniform

SAMPLES = 2
"""Rays per pixel along each axis."""
LIGHT = np.array([0.45, 0.8, 0.4]) / np.linalg.norm([0.45, 0.8, 0.4])
Array = np.ndarray


@dataclass(frozen=True)
class Solid:
    """An upright box or cylinder standing on the turntable, or a ball lying on it."""

    kind: str
    """`box`, `cylinder` or `ball`."""
    x: float
    z: float
    width: float
    """Half the width of a box, else the radius."""
    height: float
    turn: float
    """A box's own angle, radians."""
    colour: Array


@dataclass(frozen=True)
class Scene:
    """What stands on the turntable, and how it is painted."""

    solids: tuple[Solid, ...]
    texture: Texture
    top: Array
    rim: Array
    sky: Array
    focal: float
    """Focal length over half the frame's side."""


def views(generator: np.random.Generator, num_frames: int, side: int, pace: Pace) -> Film:
    """The camera orbits by 45 to 90 degrees, always towards growing azimuth.

    `gentle`: by a few degrees, either way, nearing or leaving a little.
    """
    scene, camera = draw_scene(generator), draw_camera(generator, num_frames, pace)
    frames = to_frames([render(scene, pose, side) for pose in camera])
    return Film(frames, draw_fps(generator), "turntable", None, None, 0.0, camera)


def draw_camera(generator: np.random.Generator, num_frames: int, pace: Pace) -> Array:
    """Azimuth and elevation in degrees and distance of every frame, `[F, 3]`."""
    azimuth, elevation, distance = generator.uniform(0, 360), generator.uniform(26, 38), generator.uniform(3.3, 3.6)
    progress = np.linspace(0, 1, num_frames)
    if pace == "full":
        sweep, rise, nearing = generator.uniform(45, 90), 0.0, 0.0
    else:
        sweep = log_uniform(generator, 0.7, 14) * generator.choice([-1.0, 1.0])
        rise = log_uniform(generator, 0.2, 5) * generator.choice([-1.0, 1.0])
        nearing = log_uniform(generator, 0.01, 0.25) * generator.choice([-1.0, 1.0])
    columns = (azimuth + sweep * progress, elevation + rise * progress, distance + nearing * progress)
    return np.stack(columns, axis=1)


def draw_scene(generator: np.random.Generator) -> Scene:
    """Three to five solids of vivid colours that do not overlap."""
    solids: list[Solid] = []
    wanted = generator.integers(3, 6)
    for _ in range(60):
        kind = str(generator.choice(["box", "cylinder", "ball"]))
        width = generator.uniform(0.14, 0.24)
        reach, angle = 0.72 * np.sqrt(generator.random()), generator.uniform(0, 2 * np.pi)
        x, z = reach * np.cos(angle), reach * np.sin(angle)
        room = width * (np.sqrt(2) if kind == "box" else 1)
        clear = all(np.hypot(x - s.x, z - s.z) > room + s.width * np.sqrt(2) + 0.04 for s in solids)
        if clear and len(solids) < wanted:
            height = 2 * width if kind == "ball" else generator.uniform(0.25, 0.75)
            solids.append(Solid(kind, x, z, width, height, generator.uniform(0, np.pi / 2), vivid(generator)))
    return Scene(
        solids=tuple(solids),
        texture=draw_texture(generator, 0.45, 1.1),
        top=dull(generator, 110, 170),
        rim=dull(generator, 50, 80),
        sky=dull(generator, 90, 190),
        focal=2.75,
    )


def render(scene: Scene, pose: Array, side: int) -> Array:
    """The scene from a camera `(azimuth, elevation, distance)`, floats `[H, W, 3]`."""
    eye, rays = _rays(pose, side * SAMPLES, scene.focal)
    shape = rays.shape[:2]
    colour = scene.sky + (1 - np.linspace(0, 1, shape[0])[:, None, None]) * 25 + np.zeros((*shape, 3))
    nearest = np.full(shape, np.inf, np.float32)

    # The turntable: its top is a disc, its side a shallow cylinder.
    depth = -eye[1] / rays[..., 1]
    x, z = eye[0] + depth * rays[..., 0], eye[2] + depth * rays[..., 2]
    on_top = (depth > 0) & (np.hypot(x, z) < 1)
    paint = scene.top + (26 * scene.texture(x, z))[..., None]
    paint = np.where((np.hypot(x, z) > 0.93)[..., None], scene.rim, paint)
    colour[on_top], nearest[on_top] = paint[on_top], depth[on_top]
    hit, normal = _cylinder(eye, rays, 0.0, 0.0, 1.0, -0.09, 0.0)
    _paint(colour, nearest, hit, normal, scene.rim)

    for solid in scene.solids:
        if solid.kind == "ball":
            hit, normal = _ball(eye, rays, solid)
        elif solid.kind == "cylinder":
            hit, normal = _cylinder(eye, rays, solid.x, solid.z, solid.width, 0.0, solid.height)
        else:
            hit, normal = _box(eye, rays, solid)
        _paint(colour, nearest, hit, normal, solid.colour)
    blocks = colour.reshape(side, SAMPLES, side, SAMPLES, 3)
    image: Array = blocks.mean(axis=(1, 3))
    return image


def _rays(pose: Array, pixels: int, focal: float) -> tuple[Array, Array]:
    azimuth, elevation, distance = np.radians(pose[0]), np.radians(pose[1]), pose[2]
    back = np.array([np.cos(elevation) * np.cos(azimuth), np.sin(elevation), np.cos(elevation) * np.sin(azimuth)])
    target = np.array([0.0, 0.12, 0.0])
    right = np.array([np.sin(azimuth), 0.0, -np.cos(azimuth)])
    up = np.cross(back, right)
    at = 2 * (np.arange(pixels) + 0.5) / pixels - 1
    column, row = np.meshgrid(at, -at)
    rays = column[..., None] * right + row[..., None] * up - focal * back
    eye: Array = target + distance * back
    return eye.astype(np.float32), (rays / np.linalg.norm(rays, axis=-1, keepdims=True)).astype(np.float32)


def _paint(colour: Array, nearest: Array, depth: Array, normal: Array, base: Array) -> None:
    front = depth < nearest
    light = 0.55 + 0.45 * np.clip(normal[front] @ LIGHT, 0, 1)
    colour[front], nearest[front] = light[:, None] * base, depth[front]


def _ball(eye: Array, rays: Array, solid: Solid) -> tuple[Array, Array]:
    offset = eye - np.array([solid.x, solid.width, solid.z], np.float32)
    half = rays @ offset
    inside = half**2 - (offset @ offset - solid.width**2)
    depth = np.where(inside > 0, -half - np.sqrt(np.maximum(inside, 0)), np.inf)
    depth = np.where(depth > 0, depth, np.inf)
    normal = (offset + np.where(np.isfinite(depth), depth, 0)[..., None] * rays) / solid.width
    return depth, normal


def _cylinder(
    eye: Array, rays: Array, x: float, z: float, radius: float, low: float, high: float
) -> tuple[Array, Array]:
    """Depth and normal of an upright cylinder with its lid; infinite where it is not hit."""
    off_x, off_z = eye[0] - x, eye[2] - z
    a = rays[..., 0] ** 2 + rays[..., 2] ** 2
    half = rays[..., 0] * off_x + rays[..., 2] * off_z
    inside = half**2 - a * (off_x**2 + off_z**2 - radius**2)
    depth = np.where(inside > 0, (-half - np.sqrt(np.maximum(inside, 0))) / a, np.inf)
    y = eye[1] + np.where(np.isfinite(depth), depth, 0) * rays[..., 1]
    depth = np.where((depth > 0) & (y > low) & (y < high), depth, np.inf)
    finite = np.where(np.isfinite(depth), depth, 0)
    normal = np.stack(
        [(off_x + finite * rays[..., 0]) / radius, np.zeros_like(finite), (off_z + finite * rays[..., 2]) / radius], -1
    )
    lid = (high - eye[1]) / rays[..., 1]
    on_lid = (lid > 0) & (np.hypot(off_x + lid * rays[..., 0], off_z + lid * rays[..., 2]) < radius)
    return np.where(on_lid, lid, depth), np.where(on_lid[..., None], np.array([0.0, 1.0, 0.0]), normal)


def _box(eye: Array, rays: Array, solid: Solid) -> tuple[Array, Array]:
    """Slab method in the box's own axes."""
    cos, sin = np.cos(solid.turn), np.sin(solid.turn)
    into = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]], np.float32)
    half = np.array([solid.width, solid.height / 2, solid.width], np.float32)
    origin = into @ (eye - np.array([solid.x, solid.height / 2, solid.z], np.float32))
    ways = rays @ into.T
    with np.errstate(divide="ignore", invalid="ignore"):
        near = (-np.sign(ways) * half - origin) / ways
        far = (np.sign(ways) * half - origin) / ways
    axis = near.argmax(-1)
    depth = near.max(-1)
    depth = np.where((depth < far.min(-1)) & (depth > 0), depth, np.inf)
    own = -np.sign(np.take_along_axis(ways, axis[..., None], -1)) * np.eye(3, dtype=np.float32)[axis]
    return depth, own @ into
