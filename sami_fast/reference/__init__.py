"""The truth every faster path is held against: plain torch, any device, float64 when asked."""

from .attention import attention
from .gaussian_log_prob import gaussian_kl, gaussian_log_prob, gaussian_reparameterize
from .group_norm_silu import group_norm_silu
from .guided_loss import guided_loss
from .noise_sample import noise_sample
from .random import EVALUATION_STEP, Stream, random_normal, random_permutation, random_uniform

__all__ = [
    "EVALUATION_STEP",
    "Stream",
    "attention",
    "gaussian_kl",
    "gaussian_log_prob",
    "gaussian_reparameterize",
    "group_norm_silu",
    "guided_loss",
    "noise_sample",
    "random_normal",
    "random_permutation",
    "random_uniform",
]
