"""What the page asks for: images taken in, latents moved, pictures drawn, axes found and named. Callers take turns, as app.py sees to."""

import base64
import io
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..data import Dataset
from ..data.dataset import image_names
from ..data.decode import image_suffixes
from ..data.pixels import resize, square, to_unit, with_channels
from ..errors import UserError, one_line, printable
from ..evaluation.run import places, readable
from ..latents import sampling
from ..latents.axes import Axes
from ..latents.discovery import NUM_LEVELS, discover
from ..latents.images import image_grid, write_png
from ..methods.latent_model import LatentModel
from ..metrics.latents import information_per_dim, live_dims
from ..pictures import as_seen

Stage = Literal["coarse", "invert", "fine"]
Event = dict[str, Any]

COARSE_STEPS = 12  # of a preview
HELD_OUT = 24  # images that are offered
REFERENCE_IMAGES = 256  # that ranges of latents are taken from
KEPT_IMAGES = 64  # that were shown; of more the oldest are forgotten
MOST_BYTES = 32 << 20  # of an uploaded file
MOST_PIXELS = 64_000_000  # of an uploaded image
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")  # not all of Pillow's: for some it starts other programs
ALIGNED = (218, 178)  # height and width of CelebA's aligned images, the only ones that its crops fit
UNSEEN = 3.0  # ends of a slider where no images tell the range: prior standard deviations
MOST_VALUE = 1e6
MOST_NAME = 60  # letters
LATENTS, FILE = "latents", "file"  # sets of axes beside those that are found
FOUND = {"images": 128, "draws": 2, "steps": 16}  # for axes within a minute; `sami-fast axes` takes more of each


class Cancelled(Exception):
    """Nobody waits for the picture any more."""


@dataclass
class Shown:
    """An image that somebody looks at.

    Attributes:
        x_0: [1, C, H, W] in [-1, 1], on the CPU.
        mu, var: Of q(z|x_0). [1, Z] float64.
        note: How it was made to fit, for people.
        x_T: The noise that it is made of, once it was asked for. [1, C, H, W].
    """

    x_0: Tensor
    mu: np.ndarray
    var: np.ndarray
    note: str
    x_T: Tensor | None = None


@dataclass
class AxisSet:
    """Axes that can be moved together, and what is said of them."""

    label: str
    axes: Axes
    low: np.ndarray  # [A], ends of the range over the data
    high: np.ndarray
    notes: list[str]  # A
    order: list[int]  # which are shown, first ones first
    hidden: list[int]  # those that carry nothing


class Explorer:
    """A model, the images it was shown, and the axes it is moved along.

    Args:
        model: Of any method.
        name: What the page calls it.
        axes_file: Where named axes are saved; axes that lie there are offered.
        dataset: Held-out images; None where there are none, and then `missing` says why.
        information: Of each latent, nats, as the run's report says it; counted on held-out images when None.
        crop: What the run cut out of its images, as `data.pixels.square` names it.
        steps: Of the reverse process behind a finished picture.
        progress: Called with the number of held-out images that were looked at since, `REFERENCE_IMAGES` in all at most.
    Raises:
        UserError: axes_file is no file of axes, or of other latents.
    """

    def __init__(
        self,
        model: LatentModel,
        name: str,
        axes_file: Path,
        *,
        dataset: Dataset | None = None,
        missing: str = "",
        information: Sequence[float] | None = None,
        crop: str = "center",
        steps: int = sampling.NUM_STEPS,
        progress: Callable[[int], object] = lambda count: None,
    ) -> None:
        self.model, self.name, self.axes_file, self.missing, self.crop, self.steps = model, name, axes_file, missing, crop, steps
        self.seconds: dict[str, float] = {}  # that a stage of one picture took last
        self._shown: OrderedDict[str, Shown] = OrderedDict()
        self._dataset = dataset
        self._index = torch.arange(0) if dataset is None else readable(dataset, places(dataset, REFERENCE_IMAGES))
        self.thumbnails = [png(image[None]) for image in self._images(torch.arange(min(HELD_OUT, len(self._index))))]
        offered = self._index[: len(self.thumbnails)]
        self.names = [] if dataset is None else [printable(name) for name in image_names(dataset, offered)]
        self._z, counted = self._reference(progress)
        self.information = counted if information is None else np.asarray(information, dtype=np.float64)
        self.sets = {LATENTS: self._latent_set()}
        if axes_file.exists():
            axes = Axes.load(axes_file)
            if len(axes.center) != model.latent_size:
                raise UserError(f"{axes_file}: expected axes of {model.latent_size} latent dimensions, found {len(axes.center)}")
            self.sets[FILE] = self._saved_set(axes)

    def _images(self, index: Tensor) -> Tensor:
        """Held-out images by their place among those that were chosen. [n] -> [n, C, H, W], on the CPU."""
        if self._dataset is None or not len(index):
            return torch.zeros(0, *self.model.image_shape)
        return self._dataset.images(self._index[index]).cpu()

    def _reference(self, progress: Callable[[int], object]) -> tuple[np.ndarray, np.ndarray | None]:
        """Sampled latents of held-out images, [N, Z] float64, and the information in each latent, where it can be counted."""
        drawn, mu, var = [np.zeros((0, self.model.latent_size))], [], []
        for part in torch.arange(len(self._index)).split(64):
            posterior = sampling.encode(self.model, self._images(part))
            drawn.append(_numbers(posterior.draw(part.to(self.model.device), 0)))
            mu.append(_numbers(posterior.mu))
            var.append(_numbers(posterior.var))
            progress(len(part))
        counted = None if self.model.deterministic or len(self._index) < 2 else information_per_dim(np.concatenate(mu), np.concatenate(var))
        return np.concatenate(drawn), counted

    def _axis_set(self, label: str, axes: Axes, notes: Sequence[str] = (), order: Sequence[int] | None = None) -> AxisSet:
        every = list(range(len(axes.names)))
        if len(self._z) > 1:
            coordinates = torch.from_numpy(axes.coordinates(self._z))
            low, high = np.array([sampling.axis_values(coordinates, axis, 2).tolist() for axis in every]).T
        else:
            low, high = np.full((2, len(every)), UNSEEN) * [[-1], [1]]
        chosen = every if order is None else list(order)
        return AxisSet(label, axes, low, high, list(notes) or [""] * len(every), chosen, sorted({*every} - {*chosen}))

    def _latent_set(self) -> AxisSet:
        axes = Axes.of_latents(self.model.latent_size)
        order = None if self.information is None else live_dims(self.information).tolist()
        return self._axis_set("Latents", axes, self._nats(axes), order)

    def _saved_set(self, axes: Axes) -> AxisSet:
        return self._axis_set(self.axes_file.name, axes, self._nats(axes))

    def _nats(self, axes: Axes) -> list[str]:
        """What is said of axes that are single latents."""
        if self.information is None:
            return []
        return [f"{self.information[row.argmax()]:.1f} nats" if np.count_nonzero(row) == 1 else "" for row in np.abs(axes.directions)]

    def facts(self) -> Event:
        """What the page says of the model, before any image is chosen."""
        channels, height, width = self.model.image_shape
        return {
            "name": self.name,
            "method": self.model.label,
            "size": [width, height],
            "channels": channels,
            "live": len(self.sets[LATENTS].order),
            "latents": self.model.latent_size,
            "held_out": self.names,
            "missing": self.missing,
            "inverts": not self.model.decodes,
            "finds": self.model.guides and len(self.sets[LATENTS].order) > 1 and len(self._index) > 2 * len(self.sets[LATENTS].order),
            "steps": {"coarse": self._coarse_steps, "fine": self.steps},
            "seconds": dict(self.seconds),
            "axes_file": str(self.axes_file),
            "most_bytes": MOST_BYTES,
            "sets": {key: self._set_facts(kept) for key, kept in self.sets.items()},
        }

    def _set_facts(self, kept: AxisSet) -> Event:
        axes = [
            {"name": name, "low": low, "high": high, "note": note}
            for name, low, high, note in zip(kept.axes.names, kept.low.tolist(), kept.high.tolist(), kept.notes, strict=True)
        ]
        return {"label": kept.label, "axes": axes, "order": kept.order, "hidden": kept.hidden}

    @property
    def _coarse_steps(self) -> int:
        return 0 if self.model.decodes or self.steps <= COARSE_STEPS else COARSE_STEPS

    # Images

    def upload(self, data: bytes) -> Event:
        """Take in a file of an image, cut and sized as the run's data were.

        Raises:
            UserError: it is no image, too large, or the model takes no images of files.
        """
        channels, size, width = self.model.image_shape
        if size != width or channels not in (1, 3, 4):
            raise UserError(f"this model takes images of {size} x {width} pixels and {channels} channels, and no file is made into these")
        pixels = _decoded(data, transparent=channels == 4)
        height, width = pixels.shape[:2]
        box = square(height, width, self.crop if (height, width) == ALIGNED else "center")
        fitted = with_channels(resize(torch.from_numpy(pixels).movedim(-1, 0)[None], size, box), channels)
        done = [f"{width} x {height} pixels"]
        done += ["the central square" if box == square(height, width) else f"the run's crop, {self.crop}"] if width != height else []
        done += [f"resized to {size} x {size}"] if box[2] != size else []
        done += ["in grey"] if channels == 1 and np.ptp(pixels, axis=2).any() else []
        return self._keep(to_unit(fitted.contiguous()), ", ".join(done))

    def held_out(self, number: int) -> Event:
        """Take one of the held-out images that are offered."""
        if not 0 <= number < len(self.thumbnails):
            raise UserError(f"held-out image: expected 0 to {len(self.thumbnails) - 1}, found {number}")
        unseen = ", which training never saw" if self._dataset is not None and self._dataset.held_out else ""
        return self._keep(self._images(torch.tensor([number])), f"{self.names[number]}{unseen}")

    def _keep(self, x_0: Tensor, note: str) -> Event:
        posterior = sampling.encode(self.model, x_0)
        key = secrets.token_hex(8)
        self._shown[key] = Shown(x_0, _numbers(posterior.mu), _numbers(posterior.var), note)
        if len(self._shown) > KEPT_IMAGES:
            self._shown.popitem(last=False)
        return self.image_facts(key)

    def image_facts(self, key: str) -> Event:
        """The picture, and its posterior along every set of axes."""
        shown = self._of(key)
        return {
            "image": key,
            "picture": picture(shown.x_0),
            "note": shown.note,
            "posterior": {name: _posterior(kept.axes, shown) for name, kept in self.sets.items()},
        }

    def _of(self, key: object) -> Shown:
        if not isinstance(key, str) or key not in self._shown:
            raise UserError("that image is not kept any more; choose it again")
        self._shown.move_to_end(key)
        return self._shown[key]

    # Pictures

    def reconstruct(self, key: object, watch: "Watch") -> None:
        """What the latents alone know of an image: fresh noise, and the mean of its posterior."""
        shown = self._of(key)
        self._draw(watch, sampling.starting_noise(self.model, 1, 0), torch.from_numpy(shown.mu), seed=0)

    def edit(self, key: object, axes: object, values: object, watch: "Watch", *, seed: int | None = None) -> None:
        """A picture of latents that were moved: of the image's own noise, or of new noise of `seed`.

        Args:
            key: The image; None for the center of the axes, with new noise only.
            axes: A set of axes.
            values: What its coordinates become, {number of the axis: value}; others stay as the image has them.
            watch: Gets a preview and the finished picture.
            seed: As in `sampling.traverse`; None keeps what the latents do not say of the image, as `sampling.edit` does.
        """
        kept = self._set(axes)
        z = kept.axes.center[None] if key is None else self._of(key).mu
        for axis, value in _moves(values, len(kept.axes.names)).items():
            z = kept.axes.moved(z, axis, value)
        latents = torch.from_numpy(z)
        if seed is not None:
            self._draw(watch, sampling.starting_noise(self.model, 1, seed), latents, seed=seed, axes=kept.axes)
        else:
            self._draw(watch, self._inverted([self._of(key)], watch), latents, eta=0.0, axes=kept.axes)

    def between(self, first: object, second: object, count: int, watch: "Watch") -> None:
        """Pictures on the way from one image to another, as `sampling.interpolate` draws them."""
        if not 2 <= count <= 16:
            raise UserError(f"expected 2 to 16 pictures, found {count}")
        ends = [self._of(first), self._of(second)]
        weights = torch.linspace(0, 1, count, dtype=torch.float64)
        latents = torch.lerp(torch.from_numpy(ends[0].mu), torch.from_numpy(ends[1].mu), weights[:, None])
        if self.model.decodes:
            noise = sampling.starting_noise(self.model, 1, 0).expand(count, -1, -1, -1)
        else:
            from_first, from_second = self._inverted(ends, watch)
            noise = sampling.slerp(from_first, from_second, weights)
        self._draw(watch, noise, latents, eta=0.0)

    def _inverted(self, images: Sequence[Shown], watch: "Watch") -> Tensor:
        if self.model.decodes:
            raise UserError(f"a model of method {self.model.method} decodes and has no noise to invert; draw with new noise")
        for shown in images:
            if shown.x_T is None:
                with self._stage(watch, "invert", self.steps):
                    z = None if self.model.guides else torch.from_numpy(shown.mu)
                    shown.x_T = sampling.invert(self.model, shown.x_0, z, num_steps=self.steps)
        return torch.cat([shown.x_T for shown in images if shown.x_T is not None])

    def _draw(self, watch: "Watch", x_T: Tensor, z: Tensor, *, seed: int = 0, eta: float | None = None, axes: Axes | None = None) -> None:
        """A preview and the finished pictures. Without fresh noise a preview takes the solver that is good at few steps."""
        coarse: sampling.SamplerOptions = {"solver": "dpm2m"} if eta == 0 else {"eta": eta}
        stages: list[tuple[Stage, int, sampling.SamplerOptions]] = [("fine", self.steps, {"eta": eta})]
        if self._coarse_steps:
            stages.insert(0, ("coarse", self._coarse_steps, coarse))
        for stage, steps, options in stages:
            with self._stage(watch, stage, 1 if self.model.decodes else steps, len(x_T)):
                images = sampling.reverse_process(self.model, x_T, z, seed=seed, num_steps=steps, **options)
            event: Event = {"stage": stage, "pictures": [picture(image[None]) for image in images], "seconds": dict(self.seconds)}
            if axes is not None:
                event["read"] = axes.coordinates(_numbers(sampling.encode(self.model, images.clamp(-1, 1)).mu))[0].tolist()
            watch.say(event)

    @contextmanager
    def _stage(self, watch: "Watch", stage: Stage, steps: int, pictures: int = 1) -> Iterator[None]:
        start = time.monotonic()
        with watch.steps(self.model, stage, steps):
            yield
        if pictures == 1:
            self.seconds[stage] = round(time.monotonic() - start, 3)

    # Axes

    def _set(self, key: object) -> AxisSet:
        if not isinstance(key, str) or key not in self.sets:
            raise UserError("no such axes; reload the page")
        return self.sets[key]

    def find_axes(self, watch: "Watch") -> None:
        """Axes by every method of `discover` but the one that looks at a single noise level."""
        if not self.facts()["finds"]:
            raise UserError("axes are found by a SAMI run with two live latents or more, on its held-out images")
        count = min(FOUND["images"], len(self._index))
        watch.begin("axes", count * NUM_LEVELS)
        with watch.interrupting(self.model):
            try:
                found = discover(
                    self.model,
                    lambda index: self._images(index).to(self.model.device),
                    count,
                    encoded=len(self._index),
                    draws=FOUND["draws"],
                    num_steps=FOUND["steps"],
                    batch_size=32,
                    progress=watch.add,
                )
            except ValueError as error:
                raise UserError(f"no axes found: {one_line(error)}") from None
        for each in found:
            if each.method != "level":
                notes = [f"{score:.2g}" if math.isfinite(score) else "" for score in each.score]
                self.sets[each.method] = self._axis_set(each.method, each.axes, notes)
        watch.say({"sets": {key: self._set_facts(kept) for key, kept in self.sets.items()}})

    def save_axes(self, key: object, names: object, replaces: bool) -> Event:
        """Name the axes of a set, and write it to the axes file; of the latents, those that carry something.

        Args:
            key: The set.
            names: Of all its axes.
            replaces: Whether other axes that lie in the file may go; otherwise they are named in the answer, and nothing is written.
        Raises:
            UserError: two names are the same, the file is none of axes, or cannot be written.
        """
        kept = self._set(key)
        if not isinstance(names, list) or len(names) != len(kept.axes.names) or not all(isinstance(name, str) for name in names):
            raise UserError(f"expected {len(kept.axes.names)} names")
        words = [_name(name) or old for name, old in zip(names, kept.axes.names, strict=True)]
        if twice := [word for word in words if words.count(word) > 1]:
            raise UserError(f"two axes are called {twice[0]}; give each a name of its own")
        named = replace(kept.axes, names=tuple(words))
        rows = kept.order if key == LATENTS and kept.order else list(range(len(words)))
        written = Axes(tuple(words[row] for row in rows), named.directions[rows], named.readouts[rows], named.center)
        if self.axes_file.exists():
            there = Axes.load(self.axes_file)
            same = there.directions.shape == written.directions.shape and np.allclose(there.directions, written.directions)
            if not (same or replaces):
                return {"confirm": f"{self.axes_file} holds other axes: {', '.join(there.names)[:200]}"}
        try:
            written.save(self.axes_file)
        except OSError as error:
            raise UserError(f"{self.axes_file}: cannot be written ({error.strerror or error})") from None
        kept.axes = named
        self.sets[FILE] = self._saved_set(written)
        return {"saved": str(self.axes_file), "sets": {name: self._set_facts(each) for name, each in self.sets.items()}}


class Watch:
    """Whoever waits for a picture: hears how far it is, and may go away.

    Args:
        say: Is told each event.
        gone: Whether nobody waits any more.
    """

    EVERY = 0.05  # seconds between two words of progress

    def __init__(self, say: Callable[[Event], None], gone: Callable[[], bool]) -> None:
        self.say, self._gone = say, gone
        self._what, self._of, self._done, self._last = "", 0, 0, 0.0

    def begin(self, what: str, of: int) -> None:
        """Start to count."""
        self._what, self._of, self._done, self._last = what, of, 0, -math.inf
        self.add(0)

    def add(self, count: int) -> None:
        """So much more is done. Raises `Cancelled` where nobody waits."""
        self.look()
        self._done += count
        if time.monotonic() - self._last >= self.EVERY or self._done == self._of:
            self._last = time.monotonic()
            self.say({"progress": self._what, "done": min(self._done, self._of), "of": self._of})

    def look(self) -> None:
        if self._gone():
            raise Cancelled

    @contextmanager
    def steps(self, model: LatentModel, what: str, of: int) -> Iterator[None]:
        """Inside, each evaluation of the network beside the encoder counts as one of `of` steps."""
        self.begin(what, of)
        with _before(model, lambda: self.add(1)):
            yield

    def interrupting(self, model: LatentModel) -> Any:
        """Inside, nobody's absence is noticed at the next evaluation of a network."""
        return _before(model, self.look)


@contextmanager
def _before(model: LatentModel, call: Callable[[], None]) -> Iterator[None]:
    """Call something before each evaluation of the network beside the encoder."""
    network = model.networks.get(model.partner, nn.Identity())
    hook = network.register_forward_pre_hook(lambda *_: call())
    try:
        yield
    finally:
        hook.remove()


def _numbers(values: Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()


def _name(text: str) -> str:
    """On one line, without what moves a cursor or is no letter at all."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())[:MOST_NAME].strip()


def _posterior(axes: Axes, shown: Shown) -> Event:
    """Mean and standard deviation along each axis."""
    std = np.sqrt(np.square(axes.readouts) @ shown.var[0])
    return {"mean": axes.coordinates(shown.mu)[0].tolist(), "std": std.tolist()}


def _moves(values: object, count: int) -> dict[int, float]:
    if not isinstance(values, Mapping) or len(values) > count:
        raise UserError(f"expected values of {count} axes")
    moves = {}
    for axis, value in values.items():
        if not (isinstance(axis, str) and axis.isdecimal() and len(axis) < 9 and int(axis) < count):
            raise UserError(f"expected axes 0 to {count - 1}")
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= MOST_VALUE:
            raise UserError(f"expected values up to {MOST_VALUE:g}")
        moves[int(axis)] = float(value)
    return moves


def _decoded(data: bytes, transparent: bool) -> np.ndarray:
    """A file of an image as it is seen, [H, W, 3 or 4] uint8. Its size is read, and judged, before any of its pixels."""
    from PIL import Image

    if not data:
        raise UserError("not an image: zero bytes")
    too_large = UserError(f"more than {MOST_PIXELS // 1_000_000} million pixels; make the image smaller")
    formats = (*FORMATS, "HEIF") if ".heic" in image_suffixes() else FORMATS
    try:
        with Image.open(io.BytesIO(data), formats=formats) as opened:
            if math.prod(opened.size) > MOST_PIXELS:
                raise too_large
            opened.load()
            return as_seen(opened, transparent=transparent)
    except UserError:
        raise
    except Image.DecompressionBombError:  # Pillow's own limit lies above ours
        raise too_large from None
    except Exception as error:  # Pillow's plugins raise whatever a broken file leads them to
        unknown = "cannot identify" in str(error)
        raise UserError("not an image that can be read" + ("" if unknown else f" ({one_line(error, 120)})")) from None


def png(image: Tensor) -> bytes:
    """[1, C, H, W] in [-1, 1] as a file, pixel for pixel."""
    stream = io.BytesIO()
    write_png(stream, image_grid(image, 1, scale=1))
    return stream.getvalue()


def picture(image: Tensor) -> str:
    """`png` as an address that holds the file itself."""
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()
