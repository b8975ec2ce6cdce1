"""Named directions of latent space and how to read one's place along each: what `--axes` names."""

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from ..errors import UserError, one_line
from ..files import open_regular, write_whole
from ..metrics.checks import as_finite, as_table

MOST_BYTES = 2**26  # of a file of axes, unpacked
DUAL_TOLERANCE = 1e-3  # of readouts @ directions.T: room for arrays kept in float32


@dataclass(frozen=True)
class Axes:
    """Directions of latent space, A of them, with their dual vectors: moving along one leaves the coordinates of the others as they are.

        coordinates(z) = readouts (z - center),   readouts directions^T = I

    Args:
        names: A words.
        directions: [A, Z], row a is the step in z when coordinate a grows by one; A <= Z.
        readouts: [A, Z], row a reads coordinate a.
        center: [Z], where every coordinate is 0.
    Arrays are kept as float64.
    Raises:
        ValueError: shapes do not fit, values are not finite, or readouts @ directions.T is not the identity.
    """

    names: tuple[str, ...]
    directions: np.ndarray
    readouts: np.ndarray
    center: np.ndarray

    def __post_init__(self) -> None:
        directions, readouts = as_table("directions", self.directions), as_table("readouts", self.readouts)
        center, names = as_finite("center", self.center), tuple(map(str, self.names))
        count, size = directions.shape
        expected = {"readouts": (readouts.shape, (count, size)), "center": (center.shape, (size,)), "names": ((len(names),), (count,))}
        for name, (found, wanted) in expected.items():
            if found != wanted:
                raise ValueError(f"{name}: expected shape {list(wanted)} beside directions of {[count, size]}, found {list(found)}")
        if (error := np.abs(readouts @ directions.T - np.eye(count)).max()) > DUAL_TOLERANCE:
            raise ValueError(f"readouts: expected readouts @ directions.T to be the identity, found it off by {error:.3g}")
        for name, value in (("names", names), ("directions", directions), ("readouts", readouts), ("center", center)):
            object.__setattr__(self, name, value)

    @classmethod
    def of_latents(cls, latent_size: int) -> Self:
        """The latent dimensions themselves."""
        identity = np.eye(latent_size)
        return cls(tuple(f"z{axis}" for axis in range(latent_size)), identity, identity, np.zeros(latent_size))

    @classmethod
    def along(cls, direction: np.ndarray) -> Self:
        """One direction, [Z], read by orthogonal projection from the origin."""
        row = as_table("direction", np.asarray(direction)[None])
        if not (square := float(np.square(row).sum())) > 0:
            raise ValueError("direction: expected a vector other than 0")
        return cls(("direction",), row, row / square, np.zeros(row.shape[1]))

    def coordinates(self, z: np.ndarray) -> np.ndarray:
        """Place along every axis. [N, Z] -> [N, A] float64."""
        return (self._latents(z) - self.center) @ self.readouts.T

    def moved(self, z: np.ndarray, axis: int, value: float | Sequence[float] | np.ndarray) -> np.ndarray:
        """Latents with one coordinate set, all others as they were.

        Args:
            z: [N, Z].
            axis: 0 to A - 1.
            value: What the coordinate becomes: one number, or [N].
        Returns:
            z + directions[axis] * (value - coordinate). [N, Z] float64.
        """
        return self.shifted(z, axis, value - self.coordinates(z)[:, self._axis(axis)])

    def shifted(self, z: np.ndarray, axis: int, amount: float | Sequence[float] | np.ndarray) -> np.ndarray:
        """Latents with `amount` (one number, or [N]) added to one coordinate. [N, Z] -> [N, Z] float64."""
        amounts = np.broadcast_to(np.asarray(amount, dtype=np.float64), len(z))
        return self._latents(z) + amounts[:, None] * self.directions[self._axis(axis)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the four arrays to an .npz, which `load` reads; an old file is replaced.

        Raises:
            OSError: from the system.
        """
        arrays = {"names": np.array(self.names), "directions": self.directions, "readouts": self.readouts, "center": self.center}
        write_whole(Path(path), lambda stream: np.savez(stream, **arrays))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote. No pickle is read.

        Raises:
            UserError: no such file, not an .npz, an entry missing, too large, or entries that do not fit each other.
        """
        try:
            with open_regular(path) as stream:
                with zipfile.ZipFile(stream) as archive:
                    size = sum(member.file_size for member in archive.infolist())  # what is unpacked is never more than it says
                if size > MOST_BYTES:
                    raise UserError(f"{path}: expected axes of at most {MOST_BYTES >> 20} MiB, found {size >> 20}")
                with np.load(stream, allow_pickle=False) as file:
                    if missing := {"names", "directions", "readouts", "center"} - set(file):
                        raise UserError(f"{path}: no entry {min(missing)!r}; expected names, directions, readouts and center")
                    return cls(tuple(file["names"].tolist()), file["directions"], file["readouts"], file["center"])
        except FileNotFoundError:
            raise UserError(f"{path}: no such file of axes") from None
        except UserError:
            raise
        except Exception as error:  # of the system, the archive, its compression, NumPy's header and the axes: each has kinds of its own
            raise UserError(f"{path}: not a file of axes ({getattr(error, 'strerror', None) or one_line(error)})") from None

    def _latents(self, z: np.ndarray) -> np.ndarray:
        z = as_table("z", z)
        if z.shape[1] != len(self.center):
            raise ValueError(f"z: expected [N, {len(self.center)}], as the axes have, found {list(z.shape)}")
        return z

    def _axis(self, axis: int) -> int:
        if not 0 <= axis < len(self.names):
            raise ValueError(f"axis: expected 0 to {len(self.names) - 1}, found {axis}")
        return axis
