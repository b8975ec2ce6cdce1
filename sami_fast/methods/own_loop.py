"""A method's loss in one line, for training loops of one's own: plain torch, DistributedDataParallel, Lightning, accelerate."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from .. import ops
from ..step import Draw, Objective
from .inputs import MOST_NOISY, fitted, may_be_read
from .ranks import mean_over_ranks, ranks

LOSS_STEP = "loss_step"  # in a state dict
PHASES = ("both", "encoder", "denoiser")


class StepOptions(TypedDict, total=False):
    """The keywords of `OwnLoop.training_step`; what is left out has the default that stands there."""

    step: int | None
    seed: int
    index: Tensor | None
    global_batch: int | None
    kl_weight: float
    phase: str
    weighting: str
    noise_levels: int
    time_power: float
    unconditional_weight: float
    free_bits: float
    score_method: str
    store_eps: bool


class OwnLoop(nn.Module):
    """What `LatentModel` gives to loops that are not this package's.

    Attributes:
        loss_step: The step that `loss` takes next where nobody says which. It counts the calls, and is a part of the state dict, so
            that a resumed loop goes on with noise that it has not seen; a state dict without it begins at 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loss_step = 0
        self._values_seen = False

    def loss(self, x: Tensor, **options: Unpack[StepOptions]) -> Tensor:
        """`training_step` without its terms.

        Args:
            x: Images in [-1, 1]. [B, C, H, W].
            options: Keywords of `training_step`.
        Returns:
            Scalar, nats per image, with the gradients of both networks.
        """
        return self.training_step(x, **options)[0]

    def forward(self, x: Tensor, **options: Unpack[StepOptions]) -> Tensor:
        """`loss`: what wraps a module and calls it, such as DistributedDataParallel, trains by it."""
        return self.loss(x, **options)

    def training_step(
        self,
        x: Tensor,
        *,
        step: int | None = None,
        seed: int = 0,
        index: Tensor | None = None,
        global_batch: int | None = None,
        kl_weight: float = 1.0,
        phase: str = "both",
        weighting: str = "elbo",
        noise_levels: int = 1,
        time_power: float = 1.0,
        unconditional_weight: float = 0.0,
        free_bits: float = 0.0,
        score_method: str = "auto",
        store_eps: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch and what it is made of. Noise is a function of seed, step and index alone. What the method has no use for
        is ignored.

        Args:
            x: Images in [-1, 1]. [B, C, H, W], floats. Networks get them in the dtype of their weights; noise and sums are float32, or
                float64 where weights or images are.
            step: Number of the step, from 0. None: `loss_step`, which then counts on; but in eval mode under torch.no_grad a fixed one
                that training never takes, so that validation losses can be compared.
            seed: Key of the noise.
            index: Place of each image in the whole batch over ranks. [B] int64. None: in order, rank after rank of torch's process
                group, if there is one; every rank is then taken to have B images.
            global_batch: Images in that whole batch, more than any index; None: B times the number of ranks.
            kl_weight: beta, the price of a nat; 1 is the bound. Most data need less for latents to come alive.
            phase: Who learns: "both"; "encoder", while the denoiser is a constant; or "denoiser", by itself and without guidance.
            weighting, noise_levels, time_power, unconditional_weight, free_bits: As in `step.Objective`. Free bits are granted to the
                mean over ranks; where gradients are off, when they change nothing, no rank waits for another.
            score_method, store_eps: As in `step.training_step`.
        Returns:
            loss: Scalar, nats per image, a mean over the batch.
            terms: Without gradient. Of each image, [B], nats: the terms of the method by their names in a log, such as "diffusion_nats"
                and "unguided_nats", and "kl_nats"; of each latent dimension, [B, Z]: "kl_per_dim", "mu" and "var". In phase "denoiser"
                nothing is encoded, and what is said of latents is the prior's, [1] and [1, Z].
        Raises:
            ValueError: images of another shape than the model's or none at all, values that no image has, such as 255 (of the first
                batch on a GPU, of all on the CPU), or a setting out of range.
            TypeError: images that are no floats.
        Differentiable: once, in the parameters of both networks; the encoder's score has been differentiated on the way.
        """
        model: Any = self  # a LatentModel, which has the loss
        self._check(x, phase)
        rank, world_size = ranks()
        if index is None:
            index = torch.arange(rank * len(x), (rank + 1) * len(x), device=x.device)
        if step is None and not self.training and not torch.is_grad_enabled():
            step = ops.EVALUATION_STEP
        elif step is None:
            step, self.loss_step = self.loss_step, self.loss_step + 1
        draw = Draw(seed, step, index.to(x.device), len(x) * world_size if global_batch is None else global_batch)
        objective = Objective(weighting, noise_levels, time_power, unconditional_weight, free_bits)
        with _gradients_possible():
            x = (x.clone() if x.is_inference() else x).to(torch.promote_types(x.dtype, model.arithmetic))
            parts = model.parts(objective=objective, score_method=score_method, store_eps=store_eps)
            parts = replace(parts, encoder=fitted(parts.encoder, x), denoiser=fitted(parts.denoiser, x))
            if torch.is_grad_enabled():
                parts = replace(parts, global_mean=mean_over_ranks)
            loss, measured, codes = model.training_loss(x, draw, kl_weight, parts, phase)
        kl, mu, var = codes.unbind()
        named = dict(zip((term.name for term in model.terms), measured, strict=True))
        return loss, named | {"kl_nats": kl.sum(1), "kl_per_dim": kl, "mu": mu, "var": var}

    def _check(self, x: Tensor, phase: str) -> None:
        """ValueError or TypeError unless the images and the phase can be used."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor of images, found {type(x).__name__}; of a batch with labels, pass the images")
        if x.dim() != 4 or not len(x):
            raise ValueError(f"x: expected images [B, C, H, W], found shape {list(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"x: expected floats in [-1, 1], found {x.dtype}; bytes become them by x / 127.5 - 1")
        shape: Any = getattr(self, "image_shape", None)  # there are encoders that do not say
        if shape is not None and x.shape[1:] != tuple(shape):
            raise ValueError(f"x: expected images of shape {list(shape)} (C, H, W), found {list(x.shape[1:])}")
        if may_be_read(x) and (x.device.type == "cpu" or not self._values_seen):  # a GPU would be waited for at every step
            largest, self._values_seen = x.detach().abs().amax().item(), True
            if not largest <= MOST_NOISY:
                raise ValueError(f"x: expected values in [-1, 1], found {largest:.4g}; of pixels in 0 to 255 give x / 127.5 - 1")
        if phase not in PHASES:
            raise ValueError(f"phase: expected one of {', '.join(PHASES)}, found {phase!r}")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + LOSS_STEP] = torch.tensor(self.loss_step)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:  # pyrefly: ignore[bad-override] (torch's own)
        self.loss_step = int(state_dict.pop(prefix + LOSS_STEP, 0))
        super()._load_from_state_dict(state_dict, prefix, *others)


@contextmanager
def _gradients_possible() -> Iterator[None]:
    """Inside, the encoder's score can be taken: under torch.inference_mode, in which others validate, nothing is ever differentiated."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield
