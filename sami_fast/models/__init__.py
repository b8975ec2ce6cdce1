"""The networks of the engine's own: any other encoder `x -> (mu, var)` and denoiser `(x_t, t) -> eps` works in their place."""

from .decoder import Decoder
from .denoiser import Denoiser
from .encoder import Encoder
from .half_unet import DenoiserTrunk, HalfUNet

__all__ = ["Decoder", "Denoiser", "DenoiserTrunk", "Encoder", "HalfUNet"]
