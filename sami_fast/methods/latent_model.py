"""What every trained model of this package is: an encoder q(z|x) beside another network, saved and loaded as one.

Sami (sami.py) has a denoiser and no decoder; the baselines it is compared with (baselines.py) are built and saved in the same way.
"""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self, Unpack

import torch
from torch import Tensor, nn

from .. import ops, score
from ..adapters import named_classes
from ..errors import UserError, one_line
from ..hub import HubOptions, located, upload
from ..models import Denoiser, Encoder
from ..models.layers import lay_out_weights
from ..saved import SETTINGS, count_weights, read_model_settings, read_weights, weight_files, write_model
from ..schedule import Schedule, build_schedule
from ..step import Draw, Objective, guided_terms
from .card import write_card
from .inputs import ImageLike, as_images, dtype_of, fitted
from .own_loop import LOSS_STEP, OwnLoop

FORMAT = "sami-fast/1"
GIVEN = "given"  # in the settings of a model whose networks were objects: what they were, for people
SPARE = 2**24  # numbers that a file of weights may lack and the networks are made all the same, so that the keys it lacks can be named


@dataclass(frozen=True)
class Term:
    """A measured part of a method's loss, in nats per image."""

    name: str  # in the log
    fault: str  # what a run that stops on bad numbers calls it
    legend: str  # beside its curve


@dataclass(frozen=True)
class Prose:
    """What a report says of a method, for readers who know none; `{...}` is filled in by the report."""

    summary: str  # what the method is; {price}: what its latents cost
    collapsed: str  # no latent carries anything; {latents} of them, {information} and {kl} nats
    reconstructions: str  # {steps} of the reverse process
    samples: str  # {source}: where their latents come from
    training: str  # the curves of the terms; {left}, {cost}: where they stand, what the latents cost


@dataclass(frozen=True)
class Parts:
    """What the training steps of a run are made of, the same from the first to the last.

    Attributes:
        encoder: Of clean images; the score differentiates the model's own encoder.
        denoiser: The network beside it; a decoder, of methods that decode. Either network may be compiled here, and this one may stand
            for a network in an engine of its own.
        objective: Constants of the loss.
        guided_terms: `step.guided_terms`, or the same compiled.
        score_method, store_eps, global_mean: As in `step.training_step`.
        idle_gradients: Whether a network that waits for its turn gets gradients, of zero, instead of none.
    """

    encoder: score.Encoder
    denoiser: Callable[..., Tensor]
    objective: Objective = Objective()  # noqa: RUF009 (frozen, like this class)
    guided_terms: Callable[..., tuple[Tensor, Tensor]] = guided_terms
    score_method: str = "auto"
    store_eps: bool = True
    global_mean: Callable[[Tensor], Tensor] = lambda local_mean: local_mean
    idle_gradients: bool = True


StepLoss = tuple[Tensor, tuple[Tensor, ...], Tensor]
"""Of one batch: the loss, a mean over images in nats; without gradient, the terms that `LatentModel.terms` names, [B] each, and of each
latent dimension the KL in nats, mu and var, stacked, [3, B, Z]; where nothing was encoded those of the prior, [3, 1, Z]."""


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


class LatentModel(OwnLoop):
    """An encoder, the network beside it, and the noise levels at which the data are seen.

    Args:
        encoder: x -> (mu, var), [B, C, H, W] -> two of [B, Z].
        partner: The other network; the subclass says which.
        schedule: Noise levels.
        architecture: How to rebuild networks of this package, {network: its arguments}; `save_pretrained` needs it.
        image_shape, latent_size: (C, H, W) and Z, for encoders that do not say so themselves.
    Raises:
        ValueError: a `Denoiser` with a `skip_logsnr` that knows another schedule.
    """

    method: ClassVar[str]  # its name in configs and saved files; capabilities.py says which settings it goes with
    partner: ClassVar[str]  # attribute of the network beside the encoder
    partner_type: ClassVar[type[nn.Module]]
    label: ClassVar[str]  # its name in reports
    terms: ClassVar[tuple[Term, ...]]  # of the loss; the last is what the method minimises beside the KL
    prose: ClassVar[Prose]
    guides: ClassVar[bool] = False  # whether the encoder's score steers the reverse process, and samples without latents exist
    noisy: ClassVar[bool] = True  # whether training looks at noisy images, at levels of the schedule
    deterministic: bool = False  # whether the latent is the encoder's mean, and its variance means nothing
    decodes: ClassVar[bool] = False  # whether an image comes from `decode` instead of from a reverse process
    guided_eta: ClassVar[float] = 0.0  # fresh noise of a reverse process that knows z, unless asked for otherwise

    def __init__(
        self,
        encoder: score.Encoder,
        partner: Callable[..., Tensor],
        schedule: Schedule,
        architecture: dict[str, dict[str, Any]] | None = None,
        *,
        image_shape: tuple[int, int, int] | None = None,
        latent_size: int | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.schedule, self.architecture = encoder, schedule, architecture
        setattr(self, self.partner, partner)
        if isinstance(partner, Denoiser):
            partner.use(schedule)
        self._image_shape, self._latent_size = image_shape, latent_size

    @classmethod
    def build(cls, architecture: dict[str, dict[str, Any]], schedule: dict[str, Any], **settings: Any) -> Self:
        """Networks of this package with fresh weights.

        Args:
            architecture: {"encoder": Encoder's arguments, partner: that network's arguments}.
            schedule: `Schedule.settings`, say {"kind": ..., "logsnr_min": ..., "logsnr_max": ...}.
            settings: What else the method takes: the section of a config that has its name.
        """
        levels = build_schedule(schedule)
        encoder, partner = cls.build_encoder(architecture["encoder"]), cls.build_partner(architecture[cls.partner], levels)
        return cls(encoder, partner, levels, architecture, **settings)

    @classmethod
    def build_encoder(cls, arguments: dict[str, Any], partner: nn.Module | None = None) -> nn.Module:
        """A fresh encoder of this architecture, which may start from the network beside it."""
        return Encoder(**arguments)

    @classmethod
    def build_partner(cls, arguments: dict[str, Any], schedule: Schedule) -> nn.Module:
        """A fresh network beside it."""
        return cls.partner_type(**arguments)

    @classmethod
    def sketch(cls, architecture: dict[str, dict[str, Any]]) -> list[nn.Module]:
        """Networks of this architecture, all or the larger part of them, of which only the number of weights counts."""
        return [Encoder(**architecture["encoder"]), cls.partner_type(**architecture[cls.partner])]

    @property
    def settings(self) -> dict[str, Any]:
        """What `build` needs beside the networks' arguments and the schedule."""
        return {}

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Encoder and partner by name, as far as they are modules: only these have weights."""
        both = {name: getattr(self, name) for name in ("encoder", self.partner)}
        return {name: network for name, network in both.items() if isinstance(network, nn.Module)}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return self._image_shape or self.encoder.image_shape  # pyrefly: ignore[missing-attribute] (this package's encoders say it)

    @property
    def latent_size(self) -> int:
        """Z."""
        return self._latent_size or self.encoder.latent_size  # pyrefly: ignore[missing-attribute]

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        if name in ("image_shape", "latent_size"):  # torch's own words would say that there is no such property
            raise AttributeError(f"{name}: the encoder does not say it; give it to the model, {type(self).__name__}(..., {name}=...)")
        return super().__getattr__(name)

    def know_sizes(self, images: Tensor) -> None:
        """Find out the sizes that nobody has said, from images of the data and what the encoder makes of them. [B, C, H, W].

        The encoder stays as it is, whatever mode it is in: a copy in eval mode is asked, whose norms count no images.
        """
        try:
            _ = self.image_shape
        except AttributeError:
            _, channels, height, width = images.shape
            self._image_shape = (channels, height, width)
        try:
            _ = self.latent_size
        except AttributeError:
            encoder = copy.deepcopy(self.encoder).eval() if isinstance(self.encoder, nn.Module) else self.encoder
            with torch.no_grad():
                self._latent_size = encoder(images.to(self.device))[0].shape[1]

    @property
    def device(self) -> torch.device:
        """Where the weights are; the CPU when there are none."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def placed(self, device: torch.device | str) -> Self:
        """Moved to a device for training or a command: on a GPU with the weights of our convolutions channels-last. `to` alone leaves them
        in the order of files, which is the only one that safetensors takes."""
        self.to(device)
        if self.device.type == "cuda":
            lay_out_weights(self)
        return self

    @property
    def arithmetic(self) -> torch.dtype:
        """In what images and latents are kept between the networks: float64 where a network's weights are, else float32."""
        return torch.float64 if torch.float64 in map(dtype_of, self.networks.values()) else torch.float32

    def encode(self, x: ImageLike, t: Tensor | None = None) -> Posterior:
        """q(z|x) of images, clean or noisy, on the device of the weights.

        Args:
            x: Images in [-1, 1], [B, C, H, W]; or uint8, channels last, one image, a NumPy array, Pillow images: `as_images` says how.
            t: Of noisy images, their level in [0, 1], [B]; an encoder that is blind to it has no use for it.
        Returns:
            mu and var, [B, Z] each, float32 (float64 where model or images are), whatever the dtype of the weights; var is 0 where the
            model is deterministic.
        Raises:
            ValueError: images of another shape, or with values that no image has, such as 255.
            TypeError: no images.
        Differentiable: twice, in x and the weights.
        """
        shape = self._image_shape or getattr(self.encoder, "image_shape", None)
        images = as_images(x, shape, name="x", least=self.arithmetic, noisy=True).to(self.device)
        encoder = self.encoder if t is None else score.at_level(self.encoder, t)
        mu, var = fitted(encoder, images, self.encoder)(images)
        return Posterior(mu, torch.zeros_like(mu) if self.deterministic else var)

    def parts(self, **others: Any) -> Parts:
        """What a training step is made of, nothing of it compiled. `others` are fields of `Parts`."""
        return replace(Parts(self.encoder, getattr(self, self.partner)), **others)

    def training_loss(self, x_0: Tensor, draw: Draw, kl_weight: float | Tensor, parts: Parts, phase: str = "both") -> StepLoss:
        """The loss of one batch, from which both networks learn.

        Args:
            x_0: Images in [-1, 1]. [B, C, H, W].
            draw: Which random numbers to use.
            kl_weight: beta at this step; 1 is the bound.
            parts: What the step is made of.
            phase: Who learns: "both", "encoder" or "denoiser". Only methods with a train.mode or a warm-up know the latter two.
        """
        raise NotImplementedError

    def predict_eps(self, x_t: Tensor, t: Tensor, z: Tensor | None = None, scale: float = 1.0, clip: float | None = None) -> Tensor:
        """The noise in x_t by all that the method makes of z; methods that decode have none. Arguments as in `Sami.predict_eps`."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """The mean image of latents, where the method decodes. [B, Z] -> [B, C, H, W]."""
        raise NotImplementedError

    def _weights(self) -> dict[str, Tensor]:
        """The state dict without the count of steps, which is a loop's."""
        return {name: value for name, value in self.state_dict().items() if name != LOSS_STEP}

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        weights: dict[str, Tensor] | None = None,
        *,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        run: str | os.PathLike[str] | None = None,
    ) -> None:
        """Write model.safetensors and config.json, the layout of the Hugging Face hub.

        Args:
            folder: Made if it is not there.
            weights: What to save in place of the networks' own, where these are kept in parts.
            variant: A word in the names of the files of weights, such as "fp16" for a model that is in half precision.
            max_shard_size: Bytes, or words such as "5GB", beyond which weights lie in several files with an index; None for one file.
            run: The run folder that the model comes from: its report's scores and its config become a model card, README.md.
        Raises:
            ValueError: the networks are not this package's own (`architecture` is None).
            UserError: no such run, variant or size.
            OSError: from the system.
        """
        if self.architecture is None:
            raise ValueError("architecture: expected the arguments of this package's networks; save networks of your own with safetensors")
        config = {
            "format": FORMAT,
            "method": self.method,
            **self.architecture,
            "schedule": self.schedule.settings,
            "settings": self.settings,
        }
        weights = self._weights() if weights is None else weights
        whole = {name: value.detach().cpu().contiguous() for name, value in weights.items() if isinstance(value, Tensor)}
        write_model(Path(folder), config, whole, variant=variant, max_shard_size=max_shard_size)
        if run is not None:
            write_card(self, Path(folder), Path(run), variant=variant)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        run: str | os.PathLike[str] | None = None,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload a model of sami-fast",
    ) -> str:
        """Save the model into a repository of the Hugging Face hub, with a model card, and say where.

        Args:
            repo_id: owner/name; made if it is not there.
            run, variant, max_shard_size: As in `save_pretrained`. Without a run the card says what the model is and how it is loaded.
            private: Whether a new repository is.
            token: A user's; that of `hf auth login` when None.
            revision: Branch to commit to, made if it is not there.
            create_pr: Propose the commit instead of making it.
            commit_message: Its first line.
        Returns:
            The address of the commit.
        Raises:
            ValueError, UserError: as `save_pretrained`; huggingface_hub is not installed, or the hub refuses.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
            write_card(self, Path(folder), None if run is None else Path(run), repo_id, variant)
            to: dict[str, Any] = {"private": private, "token": token, "revision": revision, "create_pr": create_pr}
            return upload(Path(folder), repo_id, variant=variant, commit_message=commit_message, **to)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_id: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        *,
        trust_remote_code: bool = False,
        **options: Unpack[HubOptions],
    ) -> Self:
        """Load what `save_pretrained` wrote. No pickle is read.

        Args:
            folder_or_id: A folder with config.json and model.safetensors, or its parts and their index; a run folder (its model/ is used);
                or, when online and huggingface_hub is installed, a hub id.
            device: Where the weights go.
            trust_remote_code: Whether classes that the saved model names may be imported, which runs their code.
            options: revision, token, cache_dir, local_files_only, subfolder, variant, as in huggingface_hub: see `HubOptions`.
        Raises:
            UserError: a run that has no model yet; files missing, damaged, of another format or of another architecture; a network that is
                a class by name, without permission to import it.
        """
        folder, config = read_saved(folder_or_id, **options)
        files = weight_files(folder, variant=options.get("variant"))
        require_trust(folder_or_id, config, trust_remote_code)
        try:
            if (method := config.get("method", "sami")) != cls.method:
                raise UserError(f"{folder_or_id}: expected a model of method {cls.method}, found {method}")
            architecture = {key: config[key] for key in ("encoder", cls.partner)}
            with torch.device("meta"):  # where networks take no memory, however large their settings say that they are
                least = sum(p.numel() for network in cls.sketch(architecture) for p in network.parameters())
            if least > (found := count_weights(files)) + SPARE:
                raise UserError(f"{files[0]}: weights of another architecture: expected {least} numbers at least, found {found}")
            model = cls.build(architecture, config["schedule"], **config.get("settings", {}))
        except UserError:
            raise
        except ImportError as error:
            raise UserError(f"{folder_or_id}: needs {error.name}: `pip install 'sami-fast[pretrained]'`") from None
        except Exception as error:  # of networks by settings that anybody may have written: of many kinds
            raise UserError(f"{folder / SETTINGS}: does not describe a model of this package ({one_line(error)})") from None
        model.load_state_dict(read_weights(files, model._weights(), lambda names: names.pop(LOSS_STEP, None)))
        return model.to(device).eval()


def require_trust(folder_or_id: str | os.PathLike[str], config: dict[str, Any], trust_remote_code: bool) -> None:
    """A `UserError` where a saved model names classes to import and there is no permission to."""
    if not trust_remote_code and (named := named_classes(config)):
        classes = " and ".join(f"its {network} is the class {spec}" for network, spec in named.items())
        raise UserError(
            f"{folder_or_id}: {classes}, code that would be imported; if you trust it, add --trust, or trust_remote_code=True in Python"
        )


def read_saved(folder_or_id: str | os.PathLike[str], **options: Unpack[HubOptions]) -> tuple[Path, dict[str, Any]]:
    """Where a saved model lies and its settings; arguments and errors as in `LatentModel.from_pretrained`."""
    folder, variant = located(folder_or_id, **options), options.get("variant")
    if not (folder / SETTINGS).is_file():
        raise UserError(f"{folder_or_id}: no {SETTINGS} there; expected a run folder or a saved model")
    weight_files(folder, variant=variant)
    config = read_model_settings(folder, variant)
    if config.get("format") != FORMAT:
        raise UserError(f"{folder / SETTINGS}: expected format {FORMAT}, found {config.get('format')!r}")
    if GIVEN in config:
        raise UserError(
            f"{folder_or_id}: its networks were given to sami_fast.train as objects, and only their weights are here; make them again and "
            f"load {weight_files(folder, variant=variant)[0].name} into the model"
        )
    return folder, config
