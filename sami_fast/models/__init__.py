"""The networks of the engine's own: any other encoder `x -> (mu, var)` and denoiser `(x_t, t) -> eps` works in their place."""

from .decoder import Decoder
from .denoiser import Denoiser
from .encoder import Encoder

__all__ = ["Decoder", "Denoiser", "Encoder"]
