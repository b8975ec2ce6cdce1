"""The public ops: what models and the step call, and what can replace a torch function of the same meaning elsewhere.

<op>.py holds an op's contract, its checks, the choice of its backend and its derivative formulas. Its class of `Launchers` has the
functions below autograd (forward, derivative, tangent, second derivative), for those who order the derivatives themselves.
"""

from ..reference import EVALUATION_STEP, Stream, gaussian_kl, gaussian_reparameterize, random_permutation
from .attention import AttentionLaunchers, attention, attention_dual
from .backend import BackendError, check_backend, describe, use_backend
from .conv2d import conv2d, conv2d_backward, laid_out
from .gaussian_log_prob import gaussian_launchers, gaussian_log_prob
from .group_norm_silu import GroupNormSiLULaunchers, group_norm_silu, group_norm_silu_dual
from .guided_loss import guided_loss
from .noise_sample import Noise, noise_sample
from .random import random_normal, random_uniform
from .stratified_uniform import stratified_uniform

__all__ = [
    "EVALUATION_STEP",
    "AttentionLaunchers",
    "BackendError",
    "GroupNormSiLULaunchers",
    "Noise",
    "Stream",
    "attention",
    "attention_dual",
    "check_backend",
    "conv2d",
    "conv2d_backward",
    "describe",
    "gaussian_kl",
    "gaussian_launchers",
    "gaussian_log_prob",
    "gaussian_reparameterize",
    "group_norm_silu",
    "group_norm_silu_dual",
    "guided_loss",
    "laid_out",
    "noise_sample",
    "random_normal",
    "random_permutation",
    "random_uniform",
    "stratified_uniform",
    "use_backend",
]
