"""The public ops: what models and the step call. Today each is its plain torch reference; faster backends register behind these names."""

from ..reference import (
    EVALUATION_STEP,
    Stream,
    attention,
    gaussian_kl,
    gaussian_log_prob,
    gaussian_reparameterize,
    group_norm_silu,
    guided_loss,
    noise_sample,
    random_normal,
    random_permutation,
    random_uniform,
)

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
