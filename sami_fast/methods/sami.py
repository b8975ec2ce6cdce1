"""The Sami module: an encoder, a denoiser and a schedule that belong together."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import score
from ..pretrained import build_denoiser, build_encoder, sketch
from ..schedule import Schedule, alpha_sigma
from ..step import Draw, denoising_step, training_step
from .inputs import fitted
from .latent_model import LatentModel, Parts, Posterior, Prose, StepLoss, Term

__all__ = ["Posterior", "Sami"]


class Sami(LatentModel):
    """Score-based autoencoder for multiscale inference.

    Args:
        encoder: Any module or callable x -> (mu, var), [B, C, H, W] -> two of [B, Z]; twice differentiable.
        denoiser: Any module or callable (x_t, t) -> eps_pred with t [B] in [0, 1].
        schedule: Noise levels.
        architecture: How to rebuild networks of this package ({"encoder": kwargs, "denoiser": kwargs}); `save_pretrained` needs it.
        image_shape, latent_size: (C, H, W) and Z, for encoders that do not say so themselves; sampling needs them.
        logsnr_max: Cleanest noise level at which latents guide the denoiser; at cleaner ones it goes its own way. Z numbers can tell the
            coarse content of an image: where they guide at all levels, most of what they could gain is in details, and what is largest
            in the images may be overlooked for it.
    Raises:
        ValueError: logsnr_max is no number.
    Source: arXiv:2512.17127; a limited interval of levels: Kynkäänniemi et al., arXiv:2404.07724.
    """

    method: ClassVar[str] = "sami"
    label: ClassVar[str] = "SAMI"
    guides: ClassVar[bool] = True
    terms: ClassVar[tuple[Term, ...]] = (
        Term("unguided_nats", "the denoiser's error", "without z"),
        Term("diffusion_nats", "the guided error (the encoder's score)", "guided by z"),
    )
    prose: ClassVar[Prose] = Prose(
        summary="SAMI is an autoencoder without a decoder. An encoder turns an image into a few numbers, the latents. To get an image "
        "back, an ordinary diffusion model removes noise step by step while the encoder steers it, towards images that the encoder would "
        "give the wanted latents. Both networks learn without labels, and every latent has to be worth the information it costs.",
        collapsed="The posterior has collapsed: none of the {latents} latents carries information ({information:.3f} nats in all, at a "
        "cost of {kl:.3f}). The diffusion model works without them, so there is nothing to traverse, and the reconstructions below are "
        "mere samples. Training in stages with a beta that is found (train.mode=staged, kl_weight.kind=auto) usually helps.",
        reconstructions="Above, images that the scores are measured on; below, what {steps} guided denoising steps make of fresh noise "
        "when all they know of the image is its latents.",
        samples="Above, images of the data. Middle, new images: latents drawn from the prior, the distribution that training pulls them "
        "towards, then guided denoising of noise. Below, what the denoiser draws without latents.",
        training="Left, the error of the estimated noise with and without the encoder's guidance: the gap is what the latents are worth; "
        "dashed, what they cost. ",
    )
    partner: ClassVar[str] = "denoiser"
    # Chosen on 16x16 disks by how well reconstructions re-encode to their z. What early levels get wrong, only fresh noise lets later
    # levels correct: 15 to 23 % of them miss some latent by half a standard deviation or more at eta 0, 2 to 3 % at 1, 0.5 % at 2.
    guided_eta: ClassVar[float] = 2.0
    denoiser: Callable[..., Tensor]

    def __init__(self, *arguments: Any, logsnr_max: float = math.inf, **others: Any) -> None:
        super().__init__(*arguments, **others)
        if not isinstance(logsnr_max, int | float) or isinstance(logsnr_max, bool) or math.isnan(logsnr_max):
            raise ValueError(f"logsnr_max: expected a number, found {logsnr_max!r}")
        self.logsnr_max = logsnr_max
        self.guided_from = 0.0  # t below which latents do not guide
        if logsnr_max < math.inf and logsnr_max < self.schedule.logsnr_max:
            self.guided_from = self.schedule.t(torch.tensor(logsnr_max, dtype=torch.float64)).item()

    @property
    def settings(self) -> dict[str, Any]:
        return {"logsnr_max": self.logsnr_max} if self.guided_from else {}

    @classmethod
    def build_encoder(cls, arguments: dict[str, Any], partner: nn.Module | None = None) -> nn.Module:
        return build_encoder(arguments, partner)

    @classmethod
    def build_partner(cls, arguments: dict[str, Any], schedule: Schedule) -> nn.Module:
        return build_denoiser(arguments, schedule)

    @classmethod
    def sketch(cls, architecture: dict[str, dict[str, Any]]) -> list[nn.Module]:
        return sketch(architecture["encoder"], architecture["denoiser"])

    def training_loss(self, x_0: Tensor, draw: Draw, kl_weight: float | Tensor, parts: Parts, phase: str = "both") -> StepLoss:
        """`step.training_step`; in phase "denoiser" `step.denoising_step`, in phase "encoder" the denoiser is a constant."""
        encoder, denoiser, objective = fitted(self.encoder, x_0), parts.denoiser, parts.objective
        if phase == "denoiser":
            loss, unguided = denoising_step(denoiser, self.schedule, x_0, draw, objective, store_eps=parts.store_eps)
            nothing = x_0.new_zeros(1, self.latent_size)
            loss = loss + _nothing(*encoder(x_0[:1])) if parts.idle_gradients else loss
            return loss, (unguided, unguided), torch.stack((nothing, nothing, nothing + 1))
        loss, terms = training_step(
            encoder,
            denoiser if phase == "both" else torch.no_grad()(denoiser),
            self.schedule,
            x_0,
            draw,
            objective,
            kl_weight,
            score_method=parts.score_method,
            store_eps=parts.store_eps,
            global_mean=parts.global_mean,
            clean_encoder=parts.encoder,
            terms_of=parts.guided_terms,
            guided_from=self.guided_from,
            shown_from=self.guided_from if phase == "encoder" else 0.0,
        )
        waits = phase == "encoder" and parts.idle_gradients
        if waits and any(p.requires_grad for n, p in self.named_parameters() if n.startswith("denoiser.")):
            # The denoiser waits for its turn; one that stays frozen has no gradients at all.
            loss = loss + _nothing(denoiser(x_0[:1], x_0.new_ones(1)))
        return loss, (terms.unguided, terms.diffusion), torch.stack((terms.kl, terms.mu, terms.var))

    def predict_eps(self, x_t: Tensor, t: Tensor, z: Tensor | None = None, scale: float = 1.0, clip: float | None = None) -> Tensor:
        """Guided noise estimate eps_theta(x_t, t) - scale sigma_t grad log q(z|x_t).

        Args:
            x_t: [B, C, H, W]. t: [B] in [0, 1].
            z: Latents to guide towards, [B, Z]; None for no guidance.
            scale: Guidance factor; 1 is Bayes' rule.
            clip: How far z may lie from the encoder's mean of x_t, in its standard deviations and per dimension; a z further off
                guides as the nearest one allowed. None for no limit, and then guidance has no bound where z does not fit x_t.
        Returns:
            [B, C, H, W].
        """
        eps_pred = fitted(self.denoiser, x_t)(x_t, t)
        return eps_pred if z is None or scale == 0.0 else eps_pred - self.guidance(x_t, t, z, scale, clip)

    def guidance(self, x_t: Tensor, t: Tensor, z: Tensor, scale: float = 1.0, clip: float | None = None) -> Tensor:
        """What `predict_eps` takes off the denoiser's estimate, scale sigma_t grad log q(z|x_t); arguments as there. [B, C, H, W]."""
        encoder = fitted(score.at_level(self.encoder, t), x_t, self.encoder)
        if clip is not None:
            mu, var = encoder(x_t)
            reach = clip * var.sqrt()
            z = torch.clamp(z, mu - reach, mu + reach)
        _, sigma_t = alpha_sigma(self.schedule.logsnr(t))
        taken_off = scale * sigma_t.view(-1, 1, 1, 1) * score.grad_log_q(encoder, x_t, z)
        first = self.guided_from
        return torch.where((t >= first).view(-1, 1, 1, 1), taken_off, 0.0) if first else taken_off


def _nothing(*outputs: Tensor) -> Tensor:
    """Zero, with gradients of zero for the parameters behind these outputs.

    Every rank reduces every gradient, so a network that waits for its turn needs some. Adam counts these steps, which makes the network's
    first updates up to twice as large; its own learning-rate warm-up covers them. The gradient of a plain sum has no order of its own, and
    on a GPU convolutions would copy it; that of a product lies as the output does.
    """
    return 0.0 * torch.stack([(output * output.detach()).sum() for output in outputs]).sum()
