"""What SAMI is compared with: a beta-VAE and a diffusion autoencoder, of the same networks, noise, data and budget.

Their losses are in nats per image, as the step's (step.py); guidance, free bits and u have no meaning here.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..models import Decoder, Denoiser
from ..step import Draw, unguided_error
from .inputs import fitted
from .latent_model import LatentModel, Parts, Prose, StepLoss, Term

COLLAPSED = (
    "The posterior has collapsed: none of the {latents} latents carries information ({information:.3f} nats in all, at a cost of "
    "{kl:.3f}), so there is nothing to traverse, and all reconstructions below are the same but for chance. A lower kl_weight often helps."
)


class Baseline(LatentModel):
    """An autoencoder whose other network is told z; its loss is the mean error of what that network makes of z, and the KL's price."""

    def training_loss(self, x_0: Tensor, draw: Draw, kl_weight: float | Tensor, parts: Parts, phase: str = "both") -> StepLoss:
        mu, var = parts.encoder(x_0)
        if self.deterministic:
            z, kl = mu, 0.0 * var  # an unused head still needs a gradient
        else:
            eps_z = ops.random_normal(draw.seed, draw.step, ops.Stream.EPS_Z, draw.index, mu.shape[1]).to(mu.dtype)
            z, kl = ops.gaussian_reparameterize(mu, var, eps_z), ops.gaussian_kl(mu, var)
        error = self.error(x_0, z, draw, parts)
        return error.mean() + kl_weight * kl.mean(0).sum(), (error.detach(),), torch.stack((kl, mu, var)).detach()

    def error(self, x_0: Tensor, z: Tensor, draw: Draw, parts: Parts) -> Tensor:
        """The loss of each image without its KL, nats. [B, C, H, W], [B, Z] -> [B]."""
        raise NotImplementedError


class BetaVAE(Baseline):
    """A variational autoencoder whose decoder is a Gaussian around its output.

        loss = ||x_0 - decoder(z)||^2 / (2 s^2) + beta KL( q(z|x_0) || N(0, I) ),   z ~ q(z|x_0)

    With the constant d ln(s sqrt(2 pi)) added and beta = 1 this is the negative ELBO of a decoder of standard deviation s.

    Args:
        decoder_std: s, in the units of x_0.
    Raises:
        ValueError: decoder_std is not positive.
    Source: Higgins et al., "beta-VAE", ICLR 2017; Kingma & Welling, arXiv:1312.6114.
    """

    method: ClassVar[str] = "beta_vae"
    label: ClassVar[str] = "β-VAE"
    noisy: ClassVar[bool] = False
    terms: ClassVar[tuple[Term, ...]] = (Term("reconstruction_nats", "the reconstruction error", "reconstruction"),)
    prose: ClassVar[Prose] = Prose(
        summary="A β-VAE is an autoencoder, trained here as a baseline that SAMI is compared with. An encoder turns an image into a few "
        "noisy numbers, the latents, and a decoder turns these back into the image. The information in the latents is charged for at a "
        "price β, so that each has to be worth what it costs. Both networks learn together, without labels.",
        collapsed=COLLAPSED,
        reconstructions="Above, images that the scores are measured on; below, what the decoder makes of their latents.",
        samples="Above, images of the data. Below, new images: latents drawn from the prior, the distribution that training pulls them "
        "towards, then the decoder.",
        training="Left, the squared error of the decoder's images, in nats; dashed, what the latents cost. ",
    )
    partner: ClassVar[str] = "decoder"
    partner_type = Decoder
    decodes: ClassVar[bool] = True
    decoder: Callable[..., Tensor]

    def __init__(self, *arguments: Any, decoder_std: float = 1.0, **others: Any) -> None:
        super().__init__(*arguments, **others)
        if not (isinstance(decoder_std, int | float) and 0 < decoder_std < 1e6):
            raise ValueError(f"decoder_std: expected a number above 0 and below 1e6, found {decoder_std!r}")
        self.decoder_std = decoder_std

    @property
    def settings(self) -> dict[str, Any]:
        return {"decoder_std": self.decoder_std}

    def error(self, x_0: Tensor, z: Tensor, draw: Draw, parts: Parts) -> Tensor:
        residual = (x_0 - parts.denoiser(z).to(x_0.dtype)).flatten(1)
        return residual.square().sum(1) / (2 * self.decoder_std**2)

    def decode(self, z: Tensor) -> Tensor:
        return fitted(self.decoder, z)(z)


class DiffAE(Baseline):
    """A diffusion autoencoder: a denoiser that is told z, trained with the encoder by the denoising loss alone.

        loss = weight ||eps - eps_theta(x_t, t, z)||^2 [+ beta KL( q(z|x_0) || N(0, I) )]

    Args:
        stochastic: z ~ q(z|x_0) and its KL is charged; otherwise z is the encoder's mean, as in the source.
    Source: Preechakul et al., arXiv:2111.15640, with z added to the embedding of the noise level; stochastic: InfoDiffusion,
    Wang et al., arXiv:2306.08757, without its mutual-information term.
    """

    method: ClassVar[str] = "diffae"
    label: ClassVar[str] = "Diffusion autoencoder"
    terms: ClassVar[tuple[Term, ...]] = (Term("diffusion_nats", "the denoiser's error", "denoising, told z"),)
    prose: ClassVar[Prose] = Prose(
        summary="A diffusion autoencoder is trained here as a baseline that SAMI is compared with. An encoder turns an image into a few "
        "numbers, the latents, and a diffusion model that is told these removes noise step by step until there is an image again. Both "
        "networks learn together, without labels. {price}",
        collapsed=COLLAPSED,
        reconstructions="Above, images that the scores are measured on; below, what {steps} denoising steps make of fresh noise when the "
        "denoiser is told the image's latents and no more.",
        samples="Above, images of the data. Below, new images: latents drawn at random{source}, then denoising of noise.",
        training="{left}he error of the noise that the denoiser estimates when it is told the latents{cost}. ",
    )
    partner: ClassVar[str] = "denoiser"
    partner_type = Denoiser
    denoiser: Callable[..., Tensor]

    def __init__(self, *arguments: Any, stochastic: bool = False, **others: Any) -> None:
        super().__init__(*arguments, **others)
        if not isinstance(stochastic, bool):
            raise ValueError(f"stochastic: expected true or false, found {stochastic!r}")
        self.deterministic = not stochastic

    @property
    def settings(self) -> dict[str, Any]:
        return {"stochastic": not self.deterministic}

    def error(self, x_0: Tensor, z: Tensor, draw: Draw, parts: Parts) -> Tensor:
        z = z.repeat_interleave(parts.objective.noise_levels, 0)
        return unguided_error(lambda x_t, t: parts.denoiser(x_t, t, z), self.schedule, x_0, draw, parts.objective, parts.store_eps)

    def predict_eps(self, x_t: Tensor, t: Tensor, z: Tensor | None = None, scale: float = 1.0, clip: float | None = None) -> Tensor:
        """eps_theta(x_t, t, z). There is no guidance to scale and nothing to clip; both are there for `Sami.predict_eps`.

        Raises:
            ValueError: no z, or a scale other than 1: this denoiser knows nothing else.
        """
        if z is None or scale != 1.0:
            raise ValueError("z: expected latents and a guidance scale of 1; a diffusion autoencoder draws nothing without them")
        return fitted(self.denoiser, x_t)(x_t, t, z)
