"""Checks that every op makes of its tensors, whichever backend runs it."""

from torch import Tensor


def check_together(op: str, **tensors: Tensor | None) -> None:
    """The tensors of a call lie on one device and share one dtype.

    Raises:
        TypeError: a dtype that is not floating or differs from the first tensor's.
        ValueError: a device that differs from the first tensor's.
    """
    given = {name: value for name, value in tensors.items() if value is not None}
    (first, like), *others = given.items()
    if not like.dtype.is_floating_point:
        raise TypeError(f"{op}: {first}: expected a floating dtype, found {like.dtype}")
    for name, value in others:
        if value.dtype != like.dtype:
            raise TypeError(f"{op}: {name}: expected {like.dtype} as {first} has, found {value.dtype}")
    check_device(op, **given)


def check_device(op: str, **tensors: Tensor) -> None:
    """ValueError unless all lie on the first one's device."""
    (first, like), *others = tensors.items()
    for name, value in others:
        if value.device != like.device:
            raise ValueError(f"{op}: {name}: expected on {like.device} as {first} is, found on {value.device}")
