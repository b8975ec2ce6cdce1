"""Denoisers that somebody else trained: discrete timesteps, any prediction, diffusers' UNet2DModel; and encoders that start from one."""

import copy
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .accelerate import accelerate
from .adapters import DenoiserAdapter, alphas_cumprod, construct, explained, named_encoder
from .errors import UserError, one_line
from .hub import UNET, HubOptions, located
from .models import Denoiser, DenoiserTrunk, Encoder, HalfUNet
from .saved import SETTINGS, read_model_settings, read_settings, read_weights, weight_files
from .schedule import Schedule, fractional_index

# Beyond what any UNet or scheduler of diffusers has, and small enough to build: of a number, of layers per block, of a list.
MOST, MOST_LAYERS, LONGEST = 2**17, 64, 2**17
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x_0"}  # diffusers' words and ours


class DiscreteTimeDenoiser(DenoiserAdapter):
    """A network (x_t, timestep) -> prediction as a denoiser (x_t, t) -> eps_pred.

    A time t of the schedule stands for a noise level. It is looked up among the noise levels of the network's own timesteps; where it lies
    between two of them, the timestep that the network gets is fractional. What the network may return: see `DenoiserAdapter`.

    Args:
        network: (x_t [B, C, H, W], timestep [B]) -> prediction.
        alphas_cumprod: alpha_t^2 of timesteps 0, 1, ..., decreasing. [N].
        schedule: The levels of training and sampling, within those of the timesteps.
        prediction: What the network predicts, in diffusers' words: "epsilon", "v_prediction" or "sample".
        fractional: Whether the network takes timesteps between two of its own; otherwise it gets the nearest, as int64. With the schedule
            `Discrete` there are none between.
    Raises:
        ValueError: unknown prediction, alphas that are no such list, a schedule with levels that no timestep has.
    Differentiable: as the network.
    Source: Ho et al., arXiv:2006.11239; Salimans & Ho, arXiv:2202.00512, v-prediction.
    """

    def __init__(
        self,
        network: Callable[[Tensor, Tensor], Any],
        alphas_cumprod: Tensor,
        schedule: Schedule,
        *,
        prediction: str = "epsilon",
        fractional: bool = True,
    ) -> None:
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction: expected {', '.join(PREDICTIONS)}, found {prediction!r}")
        super().__init__(network, schedule, time="timestep", predicts=PREDICTIONS[prediction])
        self.fractional = fractional
        self.register_buffer("levels", timestep_levels(alphas_cumprod), persistent=False)
        self.use(schedule)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `half`, `to` and the like do; noise levels go to the device and keep their precision, or timesteps would blur."""
        levels = self.levels
        super()._apply(fn, recurse)
        if not (levels.is_meta or self.levels.is_meta):
            self.levels = levels.to(self.levels.device)
        return self

    def use(self, schedule: Schedule) -> None:
        """Take t for a time of this schedule from now on; ValueError as above."""
        levels = self.levels.double()
        low, high = levels[-1].item(), levels[0].item()
        slack = 1e-6 * max(abs(low), abs(high))
        if schedule.logsnr_min < low - slack or schedule.logsnr_max > high + slack:
            raise ValueError(
                f"schedule: expected logsnr within {low:.4g} to {high:.4g}, those of the denoiser's timesteps, "
                f"found {schedule.logsnr_min:g} to {schedule.logsnr_max:g}"
            )
        self.schedule = schedule

    def told(self, t: Tensor) -> Tensor:
        """Where t in [0, 1] lies among the network's timesteps 0 ... N - 1. [B] -> [B]."""
        place = fractional_index(self.levels.double(), self.schedule.logsnr(t))
        return place if self.fractional else place.round().long()


def timestep_levels(alphas_cumprod: Tensor) -> Tensor:
    """logsnr of each timestep. [N] -> [N] float64, decreasing.

    Raises:
        ValueError: alphas_cumprod does not fall from below 1 to at least 0.
    """
    alphas = alphas_cumprod.detach().double().cpu()
    if alphas.dim() != 1 or len(alphas) < 2 or not (alphas.diff() < 0).all() or not (alphas[0] < 1 and alphas[-1] >= 0):
        raise ValueError(f"alphas_cumprod: expected at least two decreasing numbers in [0, 1), found {list(alphas.shape)}")
    return torch.logit(alphas.clamp_min(1e-9))  # a last timestep of pure noise stays finite


class UNetTrunk(nn.Module):
    """x [B, C, H, W] -> features [B, C', H', W'] of a diffusers UNet2DModel at its cleanest timestep; a copy of its layers.

    It stays in evaluation mode, as the UNet was: dropout is off, in training too.
    """

    down_blocks: nn.ModuleList
    mid_block: nn.Module | None

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.conv_in, self.down_blocks, self.mid_block = map(copy.deepcopy, (unet.conv_in, unet.down_blocks, unet.mid_block))
        with torch.no_grad():
            first = torch.zeros(1, dtype=torch.long, device=unet.device)
            self.embedding = nn.Parameter(unet.time_embedding(unet.time_proj(first).to(unet.dtype)))
        self.requires_grad_()
        self.center = unet.config.center_input_sample
        accelerate(self)  # torch's fused attention has no second derivative

    def forward(self, x: Tensor) -> Tensor:
        h, embedding = self.conv_in(2 * x - 1 if self.center else x), self.embedding.expand(x.shape[0], -1)
        for block in self.down_blocks:
            h, _ = block(hidden_states=h, temb=embedding)
        return h if self.mid_block is None else self.mid_block(h, embedding)


class DiffusersDenoiser(DiscreteTimeDenoiser):
    """A diffusers UNet2DModel with its scheduler's timesteps and prediction.

    Args:
        unet: The model.
        scheduler: The scheduler's settings, as in its scheduler_config.json.
        schedule: The levels of training and sampling.
    Raises:
        ValueError: a model or a scheduler that is not of the kind: unconditional, square images, alphas that fall with the timestep.
    """

    network: Any  # diffusers' types leave out what its models have

    def __init__(self, unet: Any, scheduler: dict[str, Any], schedule: Schedule) -> None:
        shape, channels, out = _image_shape(unet.config), unet.config.in_channels, unet.config.out_channels
        if shape is None:
            raise ValueError(f"sample_size: expected one side length, found {unet.config.sample_size}")
        if unet.class_embedding is not None:
            raise ValueError("num_class_embeds: expected an unconditional model, found one that is told a class")
        if out not in (channels, 2 * channels):
            raise ValueError(f"out_channels: expected {channels}, or {2 * channels} with a learned variance, found {out}")
        if any(hasattr(block, "skip_conv") for block in unet.down_blocks) or unet.config.time_embedding_type == "fourier":
            raise ValueError("time_embedding_type, down_block_types: expected a model of discrete timesteps, found one of a score SDE")
        settings = scheduler_settings(scheduler)
        super().__init__(
            unet,
            settings.alphas_cumprod,
            schedule,
            prediction=settings.config.prediction_type,
            fractional=unet.config.time_embedding_type == "positional",
        )
        self.image_shape, self._recomputes = shape, False
        self.architecture = {"unet": _plain(unet.config), "scheduler": _plain(scheduler)}

    def forward(self, x_t: Tensor, t: Tensor, *, recompute: bool = False) -> Tensor:
        """With `recompute`, backward computes the blocks again instead of keeping what is inside them: by `backward()` alone, and once."""
        if recompute != self._recomputes:  # the network's own answer would take a walk through all its modules at every call
            self._recomputes = recompute
            if recompute:
                self.network.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=True))
            else:
                self.network.disable_gradient_checkpointing()
        return super().forward(x_t, t)


def scheduler_settings(scheduler: dict[str, Any]) -> Any:
    """A diffusers scheduler with `alphas_cumprod` and `config.prediction_type`, of any scheduler's settings that name betas.

    Raises:
        ValueError: they name none.
    """
    from diffusers import DDPMScheduler

    if not {"beta_schedule", "trained_betas"} & scheduler.keys():
        raise ValueError(f"scheduler: expected one with betas, found {scheduler.get('_class_name', 'none')}")
    made: Any = DDPMScheduler.from_config(_plain(_bounded(scheduler)))
    if made.config.prediction_type not in PREDICTIONS:
        raise ValueError(f"prediction_type: expected {', '.join(PREDICTIONS)}, found {made.config.prediction_type}")
    return made


def _plain(settings: Any) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items() if not name.startswith("_")}


def _bounded(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a class of diffusers, which anybody may have written, and which diffusers does not check.

    Raises:
        ValueError: a number or a list is larger than there is any use for.
    """
    for name, value in settings.items():
        values = value if isinstance(value, list | tuple) else [value]
        most = MOST_LAYERS if name == "layers_per_block" else MOST
        numbers = [each for each in values if isinstance(each, int | float) and not math.isinf(each)]  # which is how no limit is written
        if len(values) > LONGEST or not all(abs(each) <= most for each in numbers):
            raise ValueError(f"{name}: expected numbers of at most {most} and lists of at most {LONGEST}, found {str(value)[:40]}")
    return settings


def _unet(settings: dict[str, Any]) -> Any:
    """A fresh UNet of diffusers."""
    from diffusers import UNet2DModel

    return UNet2DModel.from_config(_bounded(settings))


def build_denoiser(arguments: dict[str, Any], schedule: Schedule) -> nn.Module:
    """A fresh denoiser of this architecture: this package's, or a diffusers UNet."""
    if "class" in arguments:
        return named_denoiser(arguments, schedule)
    if "unet" not in arguments:
        return Denoiser(**arguments)
    return DiffusersDenoiser(_unet(arguments["unet"]), arguments["scheduler"], schedule)


def named_denoiser(arguments: dict[str, Any], schedule: Schedule) -> DenoiserAdapter:
    """The denoiser of an architecture that names a class.

    Raises:
        UserError: as `adapters.construct`, and where it does not take blank images and a time, or returns no images of their shape.
        ValueError: a schedule with levels that no timestep has.
    """
    network, time, predicts = construct("denoiser", arguments), arguments["time"], arguments["predicts"]
    if time == "timestep":
        words = {ours: theirs for theirs, ours in PREDICTIONS.items()}
        alphas = alphas_cumprod(arguments["betas"], arguments["timesteps"])
        denoiser: DenoiserAdapter = DiscreteTimeDenoiser(network, alphas, schedule, prediction=words[predicts], fractional=False)
    else:
        denoiser = DenoiserAdapter(network, schedule, time=time, predicts=predicts)
    denoiser.image_shape = tuple(arguments["image_shape"])
    with torch.no_grad(), explained("denoiser", arguments["class"], denoiser):
        denoiser(torch.zeros(2, *denoiser.image_shape), torch.tensor([0.0, 1.0]))
    return denoiser


def sketch(encoder: dict[str, Any], denoiser: dict[str, Any]) -> list[nn.Module]:
    """Networks of which only the number of weights counts; of an encoder that is half of a diffusers UNet, the UNet alone.

    None that are somebody else's classes, which may not know how to be made without memory."""
    if "class" in encoder or "class" in denoiser:
        return [] if "class" in encoder else [build_encoder(encoder)]
    network = _unet(denoiser["unet"]) if "unet" in denoiser else Denoiser(**denoiser)
    half_of = encoder.get("half_of", {})
    if "unet" in half_of and half_of != denoiser:
        raise ValueError("half_of: expected the denoiser beside it, found another")
    return [network] if "unet" in half_of else [network, build_encoder(encoder)]


def build_encoder(arguments: dict[str, Any], denoiser: nn.Module | None = None) -> nn.Module:
    """A fresh encoder of this architecture: this package's own, or half of a denoiser.

    Args:
        arguments: Encoder's; or {"half_of": the denoiser's architecture, "latent_size", "init_std"}; or those of `named_encoder`.
        denoiser: Whose weights half of it starts from; a fresh one when None.
    """
    if "class" in arguments:
        return named_encoder(arguments)
    if "half_of" not in arguments:
        return Encoder(**arguments)
    arguments = dict(arguments)
    architecture = arguments.pop("half_of")
    if "unet" in architecture:
        unet: Any = _unet(architecture["unet"]) if denoiser is None else denoiser.network
        shape = _image_shape(unet.config)
        assert shape is not None  # as `DiffusersDenoiser` checks
        return HalfUNet(UNetTrunk(unet), shape, groups=unet.config.norm_num_groups, **arguments)
    own: Any = Denoiser(**architecture) if denoiser is None else denoiser
    return HalfUNet(DenoiserTrunk(own), own.image_shape, groups=architecture["groups"], **arguments)


def is_diffusers(folder_or_id: str | os.PathLike[str]) -> bool:
    """Whether a diffusers checkpoint lies there; errors as in `hub.located`."""
    return _unet_folder(located(folder_or_id)) is not None


def _config(folder: Path) -> dict[str, Any]:
    """config.json of a folder; empty where there is none that can be read."""
    try:
        return read_model_settings(folder)
    except UserError:
        return {}


def _unet_folder(folder: Path) -> Path | None:
    return next((place for place in (folder / "unet", folder) if "_diffusers_version" in _config(place)), None)


def image_shape_of(folder_or_id: str | os.PathLike[str]) -> tuple[int, int, int] | None:
    """(C, H, W) of the images of a diffusers checkpoint or of one of this package's models, from its config alone; None if it does not say.

    Raises:
        UserError: as `hub.located`.
    """
    folder = located(folder_or_id)
    config = _config(_unet_folder(folder) or folder)
    own = config.get("denoiser") if "format" in config else config
    if isinstance(own, dict) and "class" in own and isinstance(shape := own.get("image_shape"), list) and len(shape) == 3:
        own = {"image_channels": shape[0], "image_size": shape[1:]}
    network = own.get("unet", own) if isinstance(own, dict) else None
    return _image_shape(network) if isinstance(network, dict) else None


def _image_shape(network: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """(C, H, W) by the settings of a diffusers UNet or of this package's denoiser; None where they name no square images."""
    channels, side = network.get("in_channels", network.get("image_channels")), network.get("sample_size", network.get("image_size"))
    if isinstance(side, list | tuple) and len(side) == side.count(side[0] if side else None) > 0:
        side = side[0]
    known = all(isinstance(value, int) and value > 0 for value in (channels, side))
    return (channels, side, side) if known else None


def read_scheduler(folder_or_id: str | os.PathLike[str]) -> dict[str, Any]:
    """scheduler_config.json of a diffusers checkpoint.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    folder = located(folder_or_id)
    for candidate in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
        if candidate.is_file():
            return read_settings(candidate)
    raise UserError(f"{folder_or_id}: no scheduler_config.json there, which says what the timesteps and the predictions mean")


def scheduler_levels(folder_or_id: str | os.PathLike[str]) -> list[float]:
    """logsnr of each timestep of a diffusers checkpoint, decreasing; errors as `load_diffusers`."""
    scheduler = read_scheduler(folder_or_id)
    try:
        return timestep_levels(scheduler_settings(scheduler).alphas_cumprod).tolist()
    except Exception as error:
        raise _unusable(folder_or_id, error) from None


def _unusable(folder_or_id: str | os.PathLike[str], error: Exception) -> UserError:
    if isinstance(error, ImportError):
        return UserError(f"{folder_or_id}: a diffusers model needs `pip install 'sami-fast[pretrained]'`")
    return UserError(f"{folder_or_id}: cannot be used as a denoiser ({one_line(error)})")


def load_diffusers(folder_or_id: str | os.PathLike[str], schedule: Schedule, **options: Unpack[HubOptions]) -> DiffusersDenoiser:
    """A diffusers UNet2DModel with its scheduler as a denoiser, in evaluation mode, which fine-tuning keeps: dropout is off.

    Images are in [-1, 1], diffusers' convention.

    Args:
        folder_or_id: What `save_pretrained` of a DDPMPipeline wrote, or of a UNet2DModel and a scheduler into one folder; or a hub id.
        schedule: The levels of training and sampling.
        options: revision, token, cache_dir, local_files_only, subfolder, variant: see `HubOptions`.
    Raises:
        UserError: diffusers is missing, or the checkpoint is damaged, pickled, or of another kind.
    """
    home = located(folder_or_id, **options)
    folder = _unet_folder(home) or home
    if (kind := _config(folder).get("_class_name")) != "UNet2DModel":
        raise UserError(f"{folder}: expected a UNet2DModel, found {kind}; a denoiser works on pixels and is told nothing but the timestep")
    scheduler, files = read_scheduler(home), weight_files(folder, UNET, options.get("variant"))
    settings = _plain(read_settings(folder / SETTINGS))
    try:
        from diffusers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        with torch.device("meta"):  # where it takes no memory, however large its settings say that it is
            unet = _unet(settings)
        DiffusersDenoiser(unet, scheduler, schedule)
    except Exception as error:  # of config or scheduler: diffusers raises many kinds
        raise _unusable(folder_or_id, error) from None
    renamed = getattr(unet, "_fix_state_dict_keys_on_load", None)  # attention had other names once; diffusers knows which
    weights = read_weights(files, unet.state_dict(), renamed or (lambda names: None))
    unet = _unet(settings)
    unet.load_state_dict(weights)
    return DiffusersDenoiser(unet, scheduler, schedule).eval()
