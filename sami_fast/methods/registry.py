"""The methods that can be trained, by name, and any of their saved models."""

import os
from typing import Unpack

import torch

from ..errors import UserError
from ..hub import HubOptions
from .baselines import BetaVAE, DiffAE
from .latent_model import LatentModel, read_saved
from .sami import Sami

METHODS: dict[str, type[LatentModel]] = {cls.method: cls for cls in (Sami, BetaVAE, DiffAE)}


def load_model(
    folder_or_id: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    *,
    trust_remote_code: bool = False,
    **options: Unpack[HubOptions],
) -> LatentModel:
    """A trained model of whichever method; arguments and errors as in `LatentModel.from_pretrained`."""
    _, config = read_saved(folder_or_id, **options)
    method = config.get("method", "sami")
    if not isinstance(method, str) or method not in METHODS:
        raise UserError(f"{folder_or_id}: expected a model of method {', '.join(METHODS)}, found {method!r}")
    return METHODS[method].from_pretrained(folder_or_id, device, trust_remote_code=trust_remote_code, **options)
