"""The truth every faster path is held against: plain torch, any device, float64 when asked."""

from .attention import attention, attention_dual
from .gaussian_log_prob import gaussian_kl, gaussian_log_prob, gaussian_reparameterize
from .group_norm_silu import group_norm_silu, group_norm_silu_dual
from .guided_loss import guided_loss
from .noise_sample import noise_sample
from .random import EVALUATION_STEP, Stream, random_normal, random_permutation, random_uniform
from .stratified_uniform import stratified_uniform

__all__ = [
    "EVALUATION_STEP",
    "Stream",
    "attention",
    "attention_dual",
    "gaussian_kl",
    "gaussian_log_prob",
    "gaussian_reparameterize",
    "group_norm_silu",
    "group_norm_silu_dual",
    "guided_loss",
    "noise_sample",
    "random_normal",
    "random_permutation",
    "random_uniform",
    "stratified_uniform",
]
