"""The Sami module: an encoder, a denoiser and a schedule that belong together; encode, score, save, load."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from . import ops, score
from .errors import UserError
from .files import write_text_whole, write_whole
from .models import Denoiser, Encoder
from .schedule import SCHEDULES, Schedule, alpha_sigma

FORMAT = "sami-fast/1"


@dataclass(frozen=True)
class Posterior:
    """q(z|x) of a batch: diagonal Gaussians."""

    mu: Tensor  # [B, Z]
    var: Tensor  # [B, Z]

    def sample(self, eps_z: Tensor) -> Tensor:
        """z = mu + sqrt(var) eps_z. [B, Z]"""
        return ops.gaussian_reparameterize(self.mu, self.var, eps_z)

    def draw(self, index: Tensor, seed: int) -> Tensor:
        """z ~ q(z|x) with evaluation's own noise: the same for the same seed and image, whatever the batch.

        Args:
            index: Which images these are. [B] int64 >= 0, on the device of mu.
            seed: Key of the noise.
        Returns:
            [B, Z].
        """
        eps_z = ops.random_normal(seed, ops.EVALUATION_STEP, ops.Stream.EPS_Z, index, self.mu.shape[1])
        return self.sample(eps_z.to(self.mu))

    @property
    def kl(self) -> Tensor:
        """KL from the prior per dimension, nats. [B, Z]"""
        return ops.gaussian_kl(self.mu, self.var)


class Sami(nn.Module):
    """Score-based autoencoder for multiscale inference.

    Args:
        encoder: Any module or callable x -> (mu, var), [B, C, H, W] -> two of [B, Z]; twice differentiable.
        denoiser: Any module or callable (x_t, t) -> eps_pred with t [B] in [0, 1].
        schedule: Noise levels.
        architecture: How to rebuild networks of this package ({"encoder": kwargs, "denoiser": kwargs}); `save_pretrained` needs it.
        image_shape, latent_size: (C, H, W) and Z, for encoders that do not say so themselves; sampling needs them.
    Source: arXiv:2512.17127.
    """

    def __init__(
        self,
        encoder: score.Encoder,
        denoiser: Callable[[Tensor, Tensor], Tensor],
        schedule: Schedule,
        architecture: dict[str, dict[str, Any]] | None = None,
        *,
        image_shape: tuple[int, int, int] | None = None,
        latent_size: int | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.denoiser, self.schedule = encoder, denoiser, schedule
        self.architecture = architecture
        self._image_shape, self._latent_size = image_shape, latent_size

    @classmethod
    def build(cls, architecture: dict[str, dict[str, Any]], schedule: dict[str, Any]) -> Self:
        """Networks of this package with fresh weights.

        Args:
            architecture: {"encoder": Encoder's arguments, "denoiser": Denoiser's arguments}.
            schedule: {"kind": ..., "logsnr_min": ..., "logsnr_max": ...}.
        """
        encoder, denoiser = Encoder(**architecture["encoder"]), Denoiser(**architecture["denoiser"])
        levels = SCHEDULES[schedule["kind"]](schedule["logsnr_min"], schedule["logsnr_max"])
        return cls(encoder, denoiser, levels, architecture)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return self._image_shape or self.encoder.image_shape

    @property
    def latent_size(self) -> int:
        """Z."""
        return self._latent_size or self.encoder.latent_size

    @property
    def device(self) -> torch.device:
        """Where the weights are; the CPU when there are none."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def encode(self, x: Tensor) -> Posterior:
        """q(z|x) of images, clean or noisy. [B, C, H, W] in [-1, 1] -> mu, var [B, Z]."""
        return Posterior(*self.encoder(x))

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
        eps_pred = self.denoiser(x_t, t)
        if z is None or scale == 0.0:
            return eps_pred
        if clip is not None:
            mu, var = self.encoder(x_t)
            reach = clip * var.sqrt()
            z = torch.clamp(z, mu - reach, mu + reach)
        _, sigma_t = alpha_sigma(self.schedule.logsnr(t))
        guidance = scale * sigma_t.view(-1, 1, 1, 1) * score.grad_log_q(self.encoder, x_t, z)
        return eps_pred - guidance

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write model.safetensors and config.json, the layout of the Hugging Face hub.

        Raises:
            ValueError: the networks are not this package's own (`architecture` is None).
        """
        if self.architecture is None:
            raise ValueError("architecture: expected the arguments of this package's networks; save networks of your own with safetensors")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "format": FORMAT,
            **self.architecture,
            "schedule": self.schedule.settings,
        }
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        write_whole(folder / "model.safetensors", lambda stream: stream.write(save(weights, metadata={"format": "pt"})))
        write_text_whole(folder / "config.json", json.dumps(config, indent=2))

    @classmethod
    def from_pretrained(cls, folder_or_id: str | os.PathLike[str], device: torch.device | str = "cpu") -> Self:
        """Load what `save_pretrained` wrote. No pickle is read.

        Args:
            folder_or_id: A folder with config.json and model.safetensors, a run folder (its model/ is used), or, when online and
                huggingface_hub is installed, a hub id.
            device: Where the weights go.
        Raises:
            UserError: a run that has no model yet; files missing, damaged, of another format or of another architecture.
        """
        folder = Path(folder_or_id)
        if (folder / "model" / "config.json").is_file():
            folder = folder / "model"
        elif (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
            raise UserError(f"{folder}: has no model/ yet; train to the end first (--resume continues a run)")
        if not folder.exists() and str(folder_or_id).count("/") == 1:
            folder = _download(str(folder_or_id))
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise UserError(f"{folder_or_id}: no {name} there; expected a run folder or a saved model")
        try:
            config = json.loads((folder / "config.json").read_text())
            if config.get("format") != FORMAT:
                raise UserError(f"{folder}/config.json: expected format {FORMAT}, found {config.get('format')!r}")
            model = cls.build({key: config[key] for key in ("encoder", "denoiser")}, config["schedule"])
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise UserError(f"{folder}/config.json: does not describe a model of this package ({error})") from None
        try:
            weights = load_file(folder / "model.safetensors")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder}/model.safetensors: damaged or not a safetensors file ({error})") from None
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{folder}/model.safetensors: weights of another architecture than config.json describes ({reason})") from None
        return model.to(device).eval()


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{hub_id}: no such folder; loading a hub id needs `pip install huggingface_hub`") from None
    try:
        return Path(snapshot_download(hub_id, allow_patterns=["config.json", "model.safetensors"]))
    except Exception as error:  # offline, unknown id, no permission: many kinds, one meaning
        raise UserError(f"{hub_id}: neither a folder here nor a model the hub would give ({str(error).splitlines()[0]})") from None
