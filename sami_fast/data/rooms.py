"""Rendered rooms: one object on the floor, still or moving, with the factors that made it, in the style of 3D Shapes."""

import colorsys
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from itertools import pairwise
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..config import ROOM_RANGES, DataConfig
from .pixels import to_unit
from .rendered import Rendered, needed
from .storage import take

Profile = list[tuple[float, float]]  # (radius, height) from the floor up

# Each shape is a profile turned about the vertical axis, in so many sides; its widest circle has diameter 1.
ARC = [math.pi * step / 16 for step in range(17)]
SHAPES: dict[str, tuple[Profile, int]] = {
    "box": ([(0.5, 0.0), (0.5, 0.7), (0.0, 0.7)], 4),
    "ball": ([(math.sin(angle) / 2, (1 - math.cos(angle)) / 2) for angle in ARC], 32),
    "cylinder": ([(0.5, 0.0), (0.5, 0.5), (0.0, 0.5)], 32),
    "cone": ([(0.5, 0.0), (0.0, 1.0)], 32),
}
COLOURS = {"floor": (0.6, 0.75), "walls": (0.45, 0.95), "front": (0.45, 1.0), "back": (1.0, 0.7)}  # saturation and value of each hue
SAMPLES = 4  # across a pixel and along it, whose mean is the pixel
LARGEST = 1024  # pixels on a side that are rendered at once; larger images get fewer samples


class Rooms(Rendered):
    """An object in a room, seen from above and from afar, so that its size hardly depends on its place. All of it is always in view.

    The half of the object that faces the camera at yaw 0 has a lighter tint, so that every shape shows its yaw.

    A clip walks at constant velocity from one state to another, both drawn as an image's is: its path is straight in the factors, and each
    of its frames is what the factors it is at look like. The shape and what is not `moving` stay.

    Args:
        count: Images, of training and evaluation together.
        num_clips: Clips, which are apart from the images and rendered when the first is asked for.
        shapes: Those that occur, equally often: some of "box", "ball", "cylinder" and "cone". The factor is the number in this list.
        ranges: (low, high) of each other factor, uniform: "floor_hue", "wall_hue", "object_hue" (turns of HSV's hue, from red over green),
            "size" (width of the object), "x" and "y" (of its centre, to the right and to the back, from the floor's) in halves of the
            floor's width, "yaw" (turns, counterclockwise as seen from above). A factor with low == high is a constant and is not reported,
            nor is the shape where there is only one.
        moving: Names of the ranges that change in a clip.
        seed: Key of the factors.
        clip_length: T, frames of a clip.
        others: As in `Rendered`.
    Raises:
        ValueError: no shapes, or nothing that moves, or unknown ones.
        UserError: panda3d is not installed, or the cache cannot be written.
    Source: the factors are those of 3D Shapes (https://github.com/google-deepmind/3d-shapes) and the object's place; the room is our own.
    """

    kind = "rooms"
    factor_order = (*ROOM_RANGES[:3], "shape", *ROOM_RANGES[3:])
    periods: ClassVar[dict[str, float]] = {"floor_hue": 1.0, "wall_hue": 1.0, "object_hue": 1.0, "yaw": 1.0}

    def __init__(
        self,
        count: int,
        num_clips: int,
        shapes: Sequence[str],
        ranges: Mapping[str, Sequence[float]],
        moving: Sequence[str] = ("size", "x", "y", "yaw"),
        seed: int = 0,
        clip_length: int = 16,
        **others: Any,
    ) -> None:
        for name, values, known in (("shapes", shapes, [*SHAPES]), ("moving", moving, ROOM_RANGES)):
            if not values or not {*values} <= {*known}:
                raise ValueError(f"{name}: expected some of {', '.join(known)}, found {list(values)}")
        self.shapes, self.moving, self.seed = tuple(shapes), tuple(moving), seed
        self.ranges = {name: (float(ranges[name][0]), float(ranges[name][1])) for name in ROOM_RANGES}
        limits = self.ranges | {"shape": (0.0, float(len(shapes)))}
        self._bounds = torch.tensor([limits[name] for name in self.factor_order])  # [8, 2]
        varying = self._bounds.diff(dim=1)[:, 0] > 0  # compared in float32, in which factors are drawn
        names = [name for name, varies in zip(self.factor_order, varying.tolist(), strict=True) if varies]
        self.factor_names = tuple(name for name in names if name != "shape" or len(shapes) > 1)
        self.clip_length, self._clip_count = clip_length, num_clips
        self._settings = {"shapes": self.shapes, "ranges": self.ranges, "seed": seed}
        super().__init__(count, self._settings, **others)

    @classmethod
    def from_config(cls, config: DataConfig, seed: int, split: int) -> Self:
        rooms = config.rooms
        return cls(
            *(rooms.images, rooms.clips, rooms.shapes, vars(rooms), rooms.moving, rooms.seed, config.video.clip_length),
            **cls.options(config, split),
        )

    def factors(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, F] float32, columns in the order of `factor_names`."""
        return self._reported(self._image_states(torch.from_numpy(self.places_of(index))))

    @property
    def num_clips(self) -> int:
        return self._clip_count

    def clips(self, index: Tensor) -> Tensor:
        """[n] int64, below `num_clips` -> [n, T, C, H, W] float32 in [-1, 1]."""
        clips = take(self._clips, index.cpu().numpy())
        return to_unit(self._in_channels(clips.reshape(-1, *clips.shape[2:]))).unflatten(0, clips.shape[:2])

    def clip_factors(self, index: Tensor) -> Tensor:
        """[n] int64, below `num_clips` -> [n, T, F] float32, columns in the order of `factor_names`."""
        return self._reported(self._clip_states(index))

    def render(self, states: Tensor) -> Tensor:
        """[n, 8] float32, columns in the order of `factor_order` -> [n, C, H, W] uint8."""
        return self._in_channels(np.stack([*self._drawn(states)]))

    @cached_property
    def _clips(self) -> np.ndarray:
        counts = self._clip_count, self.clip_length
        name = f"clips-{self.image_shape[1]}-{self._of(self._settings | {'moving': sorted(self.moving)}, *counts)}"
        return self._kept(name, counts, lambda: self._drawn(self._clip_states(torch.arange(counts[0])).flatten(0, 1)))

    def _rendered(self, numbers: Tensor) -> Iterator[np.ndarray]:
        return self._drawn(self._image_states(numbers))

    def _drawn(self, states: Tensor) -> Iterator[np.ndarray]:
        scene = _scene(self.image_shape[1])
        for state in states.tolist():
            values = dict(zip(self.factor_order, state, strict=True))
            yield scene.render(**values | {"shape": self.shapes[int(values["shape"])]})

    def _image_states(self, numbers: Tensor) -> Tensor:
        return self._states(self._draw(0, numbers, len(self.factor_order)))

    def _clip_states(self, numbers: Tensor) -> Tensor:
        start, end = self._draw(1, numbers, 2 * len(self.factor_order)).chunk(2, dim=1)
        moves = torch.tensor([name in self.moving for name in self.factor_order])
        start, end = self._states(start), self._states(torch.where(moves, end, start))
        return torch.lerp(start[:, None], end[:, None], torch.linspace(0, 1, self.clip_length)[:, None])

    def _draw(self, key: int, numbers: Tensor, draws: int) -> Tensor:
        return ops.random_uniform(self.seed, key, ops.Stream.FACTORS, numbers.cpu(), draws, backend="auto")

    def _states(self, u: Tensor) -> Tensor:
        """[n, 8] float32 uniforms in [0, 1) -> [n, 8] float32 in the ranges."""
        low, high = self._bounds.unbind(1)
        states, shape = low + (high - low) * u, self.factor_order.index("shape")
        states[:, shape] = states[:, shape].floor().clamp_max(len(self.shapes) - 1)  # the product may round up to the number of shapes
        return states

    def _reported(self, states: Tensor) -> Tensor:
        return states[..., [self.factor_order.index(name) for name in self.factor_names]]


class _Scene:
    """The room in panda3d's software renderer, which needs no display and no GPU.

    The floor is a square of [-1, 1] in x, to the right, and y, to the back; z points up.
    """

    def __init__(self, side: int) -> None:
        self.core = core = needed("rooms", "panda3d.core")
        self.side, self.samples = side, max(1, min(SAMPLES, LARGEST // side))
        rendered = side * self.samples
        self.engine, buffer = core.GraphicsEngine(), core.FrameBufferProperties()
        buffer.setRgbColor(True)
        buffer.setDepthBits(24)
        # By name: what is loaded by default may look for a display.
        pipe = core.GraphicsPipeSelection.getGlobalPtr().makePipe("TinyOffscreenGraphicsPipe", "p3tinydisplay")
        size = core.WindowProperties.size(rendered, rendered)
        window = self.engine.makeOutput(pipe, "room", 0, buffer, size, core.GraphicsPipe.BFRefuseWindow)
        self.texture = core.Texture()
        window.addRenderTexture(self.texture, core.GraphicsOutput.RTMCopyRam)

        self.root = core.NodePath("room")
        ambient, sun = core.AmbientLight("ambient"), core.DirectionalLight("sun")
        ambient.setColor((0.55, 0.55, 0.55, 1))
        sun.setColor((0.6, 0.6, 0.6, 1))
        placed = self.root.attachNewNode(sun)
        placed.lookAt(1.0, 1.5, -2.2)
        self.root.setLight(placed)
        self.root.setLight(self.root.attachNewNode(ambient))
        self.floor, self.walls = self.root.attachNewNode("floor"), self.root.attachNewNode("walls")
        near, high = -2.0, 1.5  # the camera sees no end of the room
        self._face(self.floor, [(-1, near, 0), (1, near, 0), (1, 1, 0), (-1, 1, 0)], [(0, 0, 1)] * 4)
        self._face(self.walls, [(-1, 1, 0), (1, 1, 0), (1, 1, high), (-1, 1, high)], [(0, -1, 0)] * 4)
        self._face(self.walls, [(-1, near, 0), (-1, 1, 0), (-1, 1, high), (-1, near, high)], [(1, 0, 0)] * 4)
        self._face(self.walls, [(1, 1, 0), (1, near, 0), (1, near, high), (1, 1, high)], [(-1, 0, 0)] * 4)
        self.objects = {name: self._turned(*shape) for name, shape in SHAPES.items()}

        lens, elevation, distance = core.PerspectiveLens(), math.radians(32), 8.0
        lens.setFov(16.6)
        camera = self.root.attachNewNode(core.Camera("camera", lens))
        camera.setPos(0, -distance * math.cos(elevation), 0.32 + distance * math.sin(elevation))
        camera.lookAt(0, 0, 0.32)
        window.makeDisplayRegion().setCamera(camera)

    def render(
        self, floor_hue: float, wall_hue: float, object_hue: float, shape: str, size: float, x: float, y: float, yaw: float
    ) -> np.ndarray:
        """One image, factors as in `Rooms`. [S, S, 3] uint8."""
        for name, one in self.objects.items():
            if name == shape:
                one.reparentTo(self.root)
            else:
                one.detachNode()
        shown = self.objects[shape]
        shown.setScale(size)
        shown.setPos(x, y, 0)
        shown.setH(360 * yaw)
        parts = {"floor": (self.floor, floor_hue), "walls": (self.walls, wall_hue)}
        parts |= {name: (shown.find(name), object_hue) for name in ("front", "back")}
        for name, (part, hue) in parts.items():
            part.setColorScale(*colorsys.hsv_to_rgb(hue % 1, *COLOURS[name]), 1)
        self.engine.renderFrame()
        rows = np.frombuffer(self.texture.getRamImageAs("RGB"), np.uint8)
        samples = rows.reshape(self.side, self.samples, self.side, self.samples, 3)[::-1, ::-1]  # the lowest row comes first
        return samples.mean((1, 3)).round().astype(np.uint8)

    def _face(self, parent: Any, corners: Sequence[tuple[float, float, float]], normals: Sequence[tuple[float, float, float]]) -> None:
        """Add a face of four corners, counterclockwise as seen from where it is seen, with a normal at each."""
        core = self.core
        data = core.GeomVertexData("face", core.GeomVertexFormat.getV3n3c4(), core.Geom.UHStatic)
        place, direction, colour = (core.GeomVertexWriter(data, name) for name in ("vertex", "normal", "color"))
        for corner, normal in zip(corners, normals, strict=True):
            place.addData3(*corner)
            direction.addData3(*normal)
            colour.addData4(1, 1, 1, 1)  # what it is scaled with is the colour
        triangles = core.GeomTriangles(core.Geom.UHStatic)
        triangles.addVertices(0, 1, 2)
        triangles.addVertices(0, 2, 3)
        geometry, node = core.Geom(data), core.GeomNode("face")
        geometry.addPrimitive(triangles)
        node.addGeom(geometry)
        parent.attachNewNode(node)

    def _turned(self, profile: Profile, sides: int) -> Any:
        """A profile turned about the vertical axis; "front" is the half towards the camera."""
        whole = self.core.NodePath("object")
        for name, first in (("front", math.pi), ("back", 0.0)):
            half = whole.attachNewNode(name)
            for side in range(sides // 2):
                edges = [first + 2 * math.pi * (side + step) / sides for step in (0, 1)]
                flat = [sum(edges) / 2] * 2  # a box has edges, a ball has none
                for (radius, bottom), (inner, top) in pairwise(profile):
                    slope = math.hypot(top - bottom, inner - radius)
                    outward, upward = (top - bottom) / slope, (radius - inner) / slope
                    left, right = edges if sides > 8 else flat
                    normals = [(outward * math.cos(a), outward * math.sin(a), upward) for a in (left, right, right, left)]
                    rim = zip((radius, radius, inner, inner), (*edges, *reversed(edges)), (bottom, bottom, top, top), strict=True)
                    self._face(half, [(r * math.cos(a), r * math.sin(a), z) for r, a, z in rim], normals)
            half.flattenStrong()
        return whole


@cache
def _scene(side: int) -> _Scene:
    return _Scene(side)
