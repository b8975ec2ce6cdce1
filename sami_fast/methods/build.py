"""From a config to its networks: fresh ones, or fresh ones around a denoiser that is trained already."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from ..adapters import EncoderAdapter, alphas_cumprod, named_classes
from ..config import NAMED_DENOISER, NAMED_ENCODER, NO_SKIP, Config, EncoderConfig, ScheduleConfig, settings_of
from ..errors import UserError
from ..pretrained import (
    DiscreteTimeDenoiser,
    build_denoiser,
    build_encoder,
    image_shape_of,
    is_diffusers,
    load_diffusers,
    scheduler_levels,
    timestep_levels,
)
from ..saved import read_weights, tensors_of, weight_files
from ..schedule import MOST_LOGSNR, Discrete, Schedule, build_schedule
from .latent_model import LatentModel, read_saved
from .registry import METHODS
from .sami import Sami


def with_images_of_denoiser(config: Config) -> Config:
    """The config with the image size and the channels of its pretrained denoiser, where it leaves them open."""
    if not config.denoiser.pretrained or (config.data.image_size and config.data.channels):
        return config
    shape = image_shape_of(config.denoiser.pretrained)
    if shape is None:
        return config
    data = replace(config.data, channels=config.data.channels or shape[0], image_size=config.data.image_size or shape[1])
    return replace(config, data=data)


def noisiest_level_of_denoiser(config: Config) -> float | None:
    """The noisiest level that the config's pretrained denoiser was trained at, if it is one of this package, with levels of its own."""
    source = config.denoiser.pretrained
    if not source or is_diffusers(source):
        return None
    schedule = read_saved(source)[1].get("schedule")
    level = schedule.get("logsnr_min") if isinstance(schedule, dict) else None
    return level if isinstance(level, int | float) and abs(level) <= MOST_LOGSNR else None


def architecture_of(config: Config, image_shape: tuple[int, int, int], denoiser: dict[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Arguments of both networks of the config's method for images of this shape, with a given denoiser's in place of the config's."""
    image = {"image_channels": image_shape[0], "image_size": image_shape[1]}
    encoder, partner = (
        {"image_shape": list(image_shape)} | {name: section[name] for name in ("class", *named)}
        if section["class"]
        else image | {name: value for name, value in section.items() if name not in (*named, "class", "start", "pretrained")}
        for section, named in ((settings_of(config.encoder), NAMED_ENCODER), (settings_of(config.denoiser), NAMED_DENOISER))
    )
    if config.encoder.class_:
        encoder["latent_size"] = config.encoder.latent_size
    if config.encoder.start == "denoiser":
        encoder = {"half_of": denoiser or partner, "latent_size": config.encoder.latent_size, "init_std": config.encoder.init_std}
    method = METHODS[config.method]
    if not method.guides:  # then z reaches the network beside the encoder as an input
        partner["latent_size"] = config.encoder.latent_size
    if not method.noisy:
        del partner["embedding_size"]
    if not method.noisy or partner.get("skip_logsnr") == NO_SKIP:  # as in models of before 2026-11-30
        partner.pop("skip_logsnr", None)
    return {"encoder": encoder, method.partner: denoiser or partner}


def schedule_of(config: Config, levels: Sequence[float] = ()) -> Schedule:
    """The schedule of a config.

    Args:
        levels: logsnr of a pretrained denoiser's timesteps, of which a discrete schedule takes those in the config's range.
    Raises:
        UserError: too few of them are.
    """
    settings = config.schedule
    if settings.kind != Discrete.kind:
        return build_schedule(asdict(settings))
    assert settings.logsnr_min is not None  # settled by `build_model`
    inside = [level for level in levels if settings.logsnr_min <= level <= settings.logsnr_max]
    if len(inside) < 2:
        raise UserError(
            f"schedule.logsnr_min, schedule.logsnr_max: expected a range with two of the denoiser's {len(levels)} timesteps or more, "
            f"found {len(inside)} in {settings.logsnr_min:g} to {settings.logsnr_max:g}"
        )
    return Discrete(inside)


def given_denoiser(config: Config) -> tuple[nn.Module, dict[str, Any], Schedule]:
    """The config's pretrained denoiser, its architecture, and the schedule of the run.

    Raises:
        UserError: there is none that can be used, or it knows other noise levels than the config asks for.
    """
    source = config.denoiser.pretrained
    if is_diffusers(source):
        schedule = schedule_of(config, scheduler_levels(source) if config.schedule.kind == Discrete.kind else ())
        denoiser = load_diffusers(source, schedule)
        return denoiser, denoiser.architecture, schedule
    if named_classes(read_saved(source)[1]):
        denoiser, architecture, trained_at = _named_denoiser(source, config.denoiser.class_)
    else:
        given = Sami.from_pretrained(source)
        assert given.architecture is not None  # a saved model says it
        denoiser, architecture, trained_at = given.networks["denoiser"], given.architecture["denoiser"], given.schedule
    if isinstance(denoiser, DiscreteTimeDenoiser):
        schedule = schedule_of(config, denoiser.levels.tolist())
        denoiser.use(schedule)
        return denoiser, architecture, schedule
    if trained_at.settings != asdict(config.schedule):
        there = ", ".join(f"{key}={value}" for key, value in trained_at.settings.items())
        raise UserError(f"schedule: the given denoiser was trained with {there}; set the same")
    return denoiser, architecture, trained_at


def _named_denoiser(source: str, permitted: str) -> tuple[nn.Module, dict[str, Any], Schedule]:
    """The denoiser of a saved model with classes by name, its architecture and its schedule; the encoder's class is not imported.

    Args:
        source: The saved model.
        permitted: The one class that may be imported: the config's own.
    """
    folder, saved = read_saved(source)
    arguments = saved.get("denoiser")
    found = arguments.get("class", "") if isinstance(arguments, dict) else ""
    if found != permitted:
        there = (
            f"the class {found}; if you trust it, set denoiser.class to the same"
            if found
            else "of this package; leave denoiser.class empty"
        )
        raise UserError(f"denoiser.pretrained: the denoiser of {source} is {there}")
    try:
        schedule = build_schedule(saved["schedule"])
        denoiser = build_denoiser(saved["denoiser"], schedule)
    except (KeyError, TypeError) as error:
        raise UserError(f"{source}: does not describe a model of this package ({error})") from None
    expected = {f"denoiser.{name}": value for name, value in denoiser.state_dict().items()}
    weights = read_weights(weight_files(folder), expected, _without_encoder)
    denoiser.load_state_dict({name.removeprefix("denoiser."): value for name, value in weights.items()})
    return denoiser, saved["denoiser"], schedule


def _without_encoder(names: dict[str, Any]) -> None:
    for name in [name for name in names if name.startswith("encoder.")]:
        del names[name]


def weights_sha256(network: nn.Module) -> str:
    """sha256 of a network's weights."""
    digest = hashlib.sha256()
    for value in tensors_of(network).values():
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def build_model(config: Config, image_shape: tuple[int, int, int]) -> LatentModel:
    """Both networks: fresh ones with weights that depend on the seed alone, and the pretrained denoiser where there is one.

    Raises:
        UserError: the image size does not fit the networks, or the pretrained denoiser does not fit the images.
    """
    method = METHODS[config.method]
    if config.schedule.logsnr_min is None:  # of no weight to plans and timings, which ask no data; training has settled it
        known = noisiest_level_of_denoiser(config)
        level = ScheduleConfig().logsnr_min if known is None else known
        config = replace(config, schedule=replace(config.schedule, logsnr_min=level))
    # The section with the method's name holds what it takes beside its networks; of what is not settled yet, its default.
    own = {name: value for name, value in asdict(getattr(config, config.method)).items() if value is not None}
    try:
        if not config.denoiser.pretrained:
            torch.manual_seed(config.seed)
            named = config.denoiser
            levels = timestep_levels(alphas_cumprod(named.betas, named.timesteps)).tolist() if named.time == "timestep" else ()
            settings = schedule_of(config, levels).settings
            model = method.build(architecture_of(config, image_shape), settings, **own)
            return _with_latents_found(model, config)
        denoiser, its_architecture, schedule = given_denoiser(config)
        if (shape := tuple(denoiser.image_shape)) != image_shape:  # pyrefly: ignore[bad-argument-type] (denoisers of either kind have one)
            raise UserError(f"denoiser.pretrained: its images are {list(shape)} (C, H, W), the data's are {list(image_shape)}")
        architecture = architecture_of(config, image_shape, its_architecture)
        torch.manual_seed(config.seed)
        encoder = build_encoder(architecture["encoder"], denoiser)
        model = _with_latents_found(method(encoder, denoiser, schedule, architecture, **own), config)
    except ValueError as error:
        raise UserError(f"encoder, denoiser or data.image_size: {error}") from None
    denoiser.requires_grad_(config.first_denoiser_step < config.train.steps)
    return model


def _with_latents_found(model: LatentModel, config: Config) -> LatentModel:
    """The model, whose architecture says how many latents an encoder of somebody else's has.

    Raises:
        UserError: other than `encoder.latent_size` asks for.
    """
    if isinstance(model.encoder, EncoderAdapter) and model.architecture is not None:
        asked, found = config.encoder.latent_size, model.encoder.latent_size
        if asked not in (found, EncoderConfig.latent_size):
            raise UserError(f"encoder.latent_size: expected {found}, the latents that {config.encoder.class_} returns, found {asked}")
        model.architecture["encoder"]["latent_size"] = found
    return model
