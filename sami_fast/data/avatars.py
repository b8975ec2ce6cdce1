"""Generated faces with exact attributes, put together from the parts that python-avatars brings, and drawn by resvg."""

import io
from collections.abc import Callable, Iterator
from typing import Any, Self
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import ops
from ..config import DataConfig
from .rendered import Rendered, needed

# What python-avatars calls each part of a face, and which of its values we use, in groups: a group of each part is drawn, all equally
# likely, then a value of the group. Left out are values that hide another part, have a colour of their own or hardly show at 64 pixels.
Groups = dict[str, tuple[str, ...]]
PARTS: dict[str, Groups] = {
    "top": {
        "bald": ("NONE",),
        "short": ("CAESAR", "SHORT_CURLY", "SHORT_FLAT", "SHORT_ROUND", "SHORT_WAVED", "PIXIE", "QUIFF"),
        "long": ("BIG_HAIR", "BOB", "CURVY", "LONG_NOT_TOO_LONG", "MIA_WALLACE", "STRAIGHT_1", "STRAIGHT_STRAND"),
        "hat": ("HAT", "TURBAN", "WINTER_HAT_1", "WINTER_HAT_3", "WINTER_HAT_4"),
    },
    "hair_color": {
        "black": ("BLACK",),
        "brown": ("BROWN", "BROWN_DARK"),
        "blond": ("BLONDE", "BLONDE_GOLDEN"),
        "red": ("RED", "AUBURN"),
        "grey": ("SILVER_GRAY",),
    },
    "skin_color": {"pale": ("PALE",), "medium": ("LIGHT", "BROWN"), "dark": ("DARK_BROWN", "BLACK")},
    "facial_hair": {
        "none": ("NONE",),
        "beard": ("BEARD_LIGHT", "BEARD_MEDIUM", "BEARD_MAGESTIC"),
        "moustache": ("MOUSTACHE_FANCY", "MOUSTACHE_MAGNUM"),
    },
    "accessory": {
        "none": ("NONE",),
        "eyeglasses": ("PRESCRIPTION_1", "PRESCRIPTION_2", "ROUND"),
        "sunglasses": ("SUNGLASSES", "WAYFARERS", "KURT"),
    },
    "eyes": {"open": ("DEFAULT", "SIDE", "SURPRISED"), "closed": ("CLOSED", "HAPPY")},
    "mouth": {"smile": ("TWINKLE",), "laugh": ("SMILE", "BIG_SMILE"), "serious": ("SERIOUS", "SAD"), "shout": ("SCREAM_OPEN", "CONCERNED")},
    "eyebrows": {"any": ("DEFAULT", "RAISED_EXCITED", "FLAT_NATURAL", "SAD_CONCERNED")},
    "clothing": {"any": ("SHIRT_CREW_NECK", "SHIRT_V_NECK", "HOODIE", "COLLAR_SWEATER")},
    "clothing_color": {"dark": ("BLACK", "HEATHER", "BLUE_03"), "light": ("WHITE", "PASTEL_YELLOW", "PASTEL_GREEN", "PINK")},
    "hat_color": {"any": ("RED", "BLUE_02", "PASTEL_GREEN", "BLACK")},
}
ENUMS = {  # by part, where it is not the part's name in capitals and "Type"
    **{"hair_color": "HairColor", "skin_color": "SkinColor", "clothing_color": "ClothingColor", "hat_color": "ClothingColor"},
    **{"facial_hair": "FacialHairType", "eyes": "EyeType", "eyebrows": "EyebrowType"},
}

Is = Callable[..., np.ndarray]  # (part, *groups) -> [N] bool, whether its group is one of these


def _hair_of(colour: str) -> Callable[[Is], np.ndarray]:
    """Hair of a colour that is seen, on the head or in the face: a hat hides the head's."""
    return lambda group: group("hair_color", colour) & (group("top", "short", "long") | group("facial_hair", "beard", "moustache"))


ATTRIBUTES: dict[str, Callable[[Is], np.ndarray]] = {
    "eyeglasses": lambda group: group("accessory", "eyeglasses"),
    "sunglasses": lambda group: group("accessory", "sunglasses"),
    "hat": lambda group: group("top", "hat"),
    "bald": lambda group: group("top", "bald"),
    "long_hair": lambda group: group("top", "long"),
    **{f"{colour}_hair": _hair_of(colour) for colour in PARTS["hair_color"]},
    "beard": lambda group: group("facial_hair", "beard"),
    "moustache": lambda group: group("facial_hair", "moustache"),
    "pale_skin": lambda group: group("skin_color", "pale"),
    "dark_skin": lambda group: group("skin_color", "dark"),
    "smiling": lambda group: group("mouth", "smile", "laugh"),
    "mouth_open": lambda group: group("mouth", "laugh", "shout"),
    "eyes_closed": lambda group: group("eyes", "closed") & ~group("accessory", "sunglasses"),  # which hide them
    "dark_clothes": lambda group: group("clothing_color", "dark"),
}
VIEW = "22 8 220 220"  # left, top, width and height of the square that is shown, of a drawing of 264 by 280
BACKGROUND = "#c8d4e0"


class Avatars(Rendered):
    """Drawn faces that wear and do what a random choice of parts says; each part is chosen independently of the others.

    An attribute is 1 where it can be seen: hair under a hat has no colour, eyes behind sunglasses are not closed.

    Args:
        count: Images, of training and evaluation together.
        seed: Key of what they show.
        others: As in `Rendered`.
    Raises:
        UserError: python-avatars or resvg-py is not installed, or the cache cannot be written.
    """

    kind = "avatars"
    factor_names = tuple(ATTRIBUTES)
    attribute_names = frozenset(ATTRIBUTES)

    def __init__(self, count: int, seed: int = 0, **others: Any) -> None:
        self.seed = seed
        super().__init__(count, {"seed": seed}, **others)

    @classmethod
    def from_config(cls, config: DataConfig, seed: int, split: int) -> Self:
        return cls(config.avatars.images, config.avatars.seed, **cls.options(config, split))

    def factors(self, index: Tensor) -> Tensor:
        """The attributes. [n] int64 -> [n, F] float32, 0 or 1, columns in the order of `factor_names`."""
        chosen = self._chosen(torch.from_numpy(self.places_of(index)))
        groups = {part: np.array([group for group, _ in chosen[part]], dtype=object) for part in PARTS}
        shown = [attribute(lambda part, *names: np.isin(groups[part], names)) for attribute in ATTRIBUTES.values()]
        return torch.from_numpy(np.stack(shown, axis=1).astype(np.float32))

    def _chosen(self, numbers: Tensor) -> dict[str, list[tuple[str, str]]]:
        """The group and the value of each part, by the images' places among all. [n] int64."""
        draws = ops.random_uniform(self.seed, 0, ops.Stream.FACTORS, numbers, 2 * len(PARTS), backend="auto").tolist()
        chosen: dict[str, list[tuple[str, str]]] = {}
        for column, (part, groups) in enumerate(PARTS.items()):
            picked = [_pick([*groups], draw[2 * column]) for draw in draws]
            chosen[part] = [(group, _pick(groups[group], draw[2 * column + 1])) for group, draw in zip(picked, draws, strict=True)]
        return chosen

    def _rendered(self, numbers: Tensor) -> Iterator[np.ndarray]:
        library, resvg = needed("avatars", "python_avatars"), needed("avatars", "resvg_py")
        chosen, side = self._chosen(numbers), self.image_shape[1]
        for place in range(len(numbers)):
            face = {part: _value(library, part, *chosen[part][place]) for part in PARTS}
            face["facial_hair_color"] = face["hair_color"]
            drawing = ElementTree.fromstring(library.Avatar(style=library.AvatarStyle.TRANSPARENT, **face).render())
            for name, value in {"viewBox": VIEW, "width": str(side), "height": str(side)}.items():
                drawing.set(name, value)
            svg = ElementTree.tostring(drawing, encoding="unicode")
            encoded = resvg.svg_to_bytes(svg_string=svg, width=side, height=side, background=BACKGROUND, skip_system_fonts=True)
            yield np.asarray(Image.open(io.BytesIO(bytes(encoded))).convert("RGB"))


def _pick(values: "list[str] | tuple[str, ...]", uniform: float) -> str:
    return values[min(int(uniform * len(values)), len(values) - 1)]


def _value(library: Any, part: str, group: str, value: str) -> Any:
    if part == "top":
        return getattr(library.HatType if group == "hat" else library.HairType, value)
    return getattr(getattr(library, ENUMS.get(part, f"{part.capitalize()}Type")), value)
