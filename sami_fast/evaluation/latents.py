"""Codes of the evaluation images: the run's own, those of its encoder before training, principal components, pixels."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from ..errors import UserError
from ..methods.latent_model import LatentModel
from ..metrics.checks import as_table
from ..metrics.latents import information_per_dim, kl_per_dim, live_dims
from ..progress import bar
from .run import Run


@dataclass(frozen=True)
class Latents:
    """Encodings of the evaluation images, in their order."""

    mu: np.ndarray  # [N, Z]
    var: np.ndarray  # [N, Z]; 0 of a deterministic encoder
    z: np.ndarray  # [N, Z], one sample of q(z|x_0) each: the codes that are scored
    kl: np.ndarray | None  # [Z], mean over the images, nats; None of a deterministic encoder, which has no rate
    live: np.ndarray  # [L] indices of the live dimensions, most informative first; all that vary, of a deterministic encoder

    @property
    def information(self) -> np.ndarray | None:
        """[Z], nats, as `information_per_dim`; None of a deterministic encoder, where it has no bound."""
        return None if self.kl is None else information_per_dim(self.mu, self.var)


@torch.no_grad()
def encode(run: Run, model: LatentModel) -> Latents:
    """Encode the evaluation images with a model for the run's images.

    Raises:
        UserError: its latents are no numbers that one could score.
    """
    mu, var, z = [], [], []
    with bar(run.count, "encoding", "images") as progress:
        for index in run.index():
            posterior = model.encode(run.images(index))
            z.append(posterior.draw(index.to(posterior.mu.device), run.config.seed))
            mu.append(posterior.mu)
            var.append(posterior.var)
            progress.update(len(index))
    try:
        mu, var, z = (as_table(name, torch.cat(parts).double().cpu().numpy()) for name, parts in (("mu", mu), ("var", var), ("z", z)))
    except ValueError as error:
        raise UserError(f"{run.folder}: its latents cannot be scored ({error})") from None
    if model.deterministic:
        return Latents(mu, var, z, None, np.flatnonzero(np.ptp(mu, axis=0) > 0))
    return Latents(mu, var, z, kl_per_dim(mu, var), live_dims(information_per_dim(mu, var)))


def untrained(run: Run) -> LatentModel:
    """The run's encoder as it was before the first step, beside its trained partner; its latents are drawn, whatever the method.

    One that started as half of a denoiser is made from the denoiser as it is now, also if that was fine-tuned. Of one that was given as an
    object the layers are drawn anew, as far as they know how (`reset_parameters`).
    """
    model = run.model
    partner = model.networks[model.partner]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.config.seed)
        if model.architecture is None:
            encoder = copy.deepcopy(model.networks["encoder"])
            for layer in encoder.modules():
                if callable(reset := getattr(layer, "reset_parameters", None)):
                    reset()
        else:
            encoder = model.build_encoder(model.architecture["encoder"], partner)
    sizes = {"image_shape": model.image_shape, "latent_size": model.latent_size}
    fresh = type(model)(encoder, partner, model.schedule, model.architecture, **sizes, **model.settings)
    fresh.deterministic = False
    return fresh.to(model.device).eval()


@dataclass(frozen=True)
class Baselines:
    """What a run's latents are compared with."""

    untrained: LatentModel
    untrained_latents: Latents
    pixels: np.ndarray  # [N, C H W] float32, of the evaluation images
    components: PCA  # of the pixels of training images: as many as the run has latents, where there are that many


def make_baselines(run: Run) -> Baselines:
    """The run's encoder before its training, and its images as they are."""

    def table(images: Callable[[Tensor], Tensor], count: int) -> np.ndarray:
        return torch.cat([images(index).flatten(1).cpu() for index in torch.arange(count).split(run.batch_size)]).numpy()

    before, train = untrained(run), table(run.train_images, run.num_train)
    components = PCA(min(run.model.latent_size, *train.shape), random_state=run.config.seed).fit(train)
    return Baselines(before, encode(run, before), table(run.images, run.count), components)
