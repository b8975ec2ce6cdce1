"""What can be trained: SAMI, the methods it is compared with, what they share, and how a config becomes networks."""

from .latent_model import LatentModel, Posterior
from .registry import METHODS, load_model

__all__ = ["METHODS", "LatentModel", "Posterior", "load_model"]
