"""Staged training: the denoiser alone, then the encoder beside it, then both, in one command.

Most of a joint step goes to the denoiser, and an encoder that starts beside an untrained one learns to repair it. Alone, the denoiser needs
first derivatives only; the encoder then learns beside a frozen one. The first stage is a run of its own, in a folder that is named after
all that shapes it, so that runs which differ in the encoder's settings alone share it, and an interrupted one is taken up again.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .config import Config, EncoderConfig, KLWeightConfig, SamiConfig, TrainConfig, load_config, settings_of
from .data import Dataset, open_dataset
from .data.spectrum import cleanest_guided_level, eigenvalues, noisiest_level
from .engine.processes import agreed, on_chief, on_each
from .errors import UserError
from .methods.build import noisiest_level_of_denoiser, with_images_of_denoiser
from .methods.ranks import ranks
from .named import source_digest

DENOISERS = "denoisers"  # folder of the first stages, beside the runs


def with_data(config: Config) -> tuple[Config, Dataset]:
    """Open the data to train on, and settle what the config leaves to them: their size, the noisiest level and the cleanest that latents
    guide at. Every rank calls it.

    Raises:
        UserError: the data cannot be used.
    """
    config = with_images_of_denoiser(config)
    dataset = opened(config)
    variances = eigenvalues(dataset) if None in (config.schedule.logsnr_min, config.sami.logsnr_max) else []
    if config.schedule.logsnr_min is None:
        known = noisiest_level_of_denoiser(config)
        level = agreed(noisiest_level(variances) if known is None else known)  # the same on every rank, to the last bit
        config = replace(config, schedule=replace(config.schedule, logsnr_min=level))
    if config.sami.logsnr_max is None:
        level = agreed(cleanest_guided_level(variances, config.encoder.latent_size))
        config = replace(config, sami=replace(config.sami, logsnr_max=level))
    return config, dataset


def opened(config: Config, split: int = 0) -> Dataset:
    """Open the data; every rank calls it. One looks into new files, which may take hours, and the others read what it found."""
    if ranks()[1] > 1:
        on_chief(lambda: open_dataset(config.data, config.seed, split))
    return on_each(lambda: open_dataset(config.data, config.seed, split))  # on another machine there may be another cache folder


def lasting_settings(config: Config, dataset: Dataset, denoiser: str) -> dict[str, Any]:
    """What a resumed run must share: the data, and all settings but where it writes, how often, and how the work is laid out.

    Args:
        denoiser: What the pretrained denoiser's weights were at the start, if there is one: its place may change, and what lies there.
    """
    settings = settings_of(config)
    for key in ("name", "runs_dir", "log", "checkpoint", "report"):
        del settings[key]
    settings["engine"] = {key: settings["engine"][key] for key in ("precision", "tf32", "score", "store_eps")}
    for key in ("decoder", "workers", "cache_dir", "cache_gib", "max_bad"):
        del settings["data"][key]
    del settings["train"]["on_collapse"], settings["data"]["labels"]  # what labels say of the split is in the fingerprint
    settings["data"]["files"] = dataset.fingerprint
    if dataset.fingerprint:  # the same files may lie elsewhere
        del settings["data"]["path"]
    if settings["data"]["range"] == "signed":  # the same as auto, but for the warning
        settings["data"]["range"] = "auto"
    settings["denoiser"]["pretrained"] = denoiser
    return settings


def as_written_now(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Lasting settings of an earlier run in the form of `new`: also an earlier version's, which knew data by place and names of files."""
    data = old.get("data")
    if isinstance(data, dict) and "path" not in new["data"] and data.get("path"):
        data = {name: value for name, value in data.items() if name != "path"}
        data["files"] = new["data"]["files"]  # what they held, nobody wrote down
    return with_later_settings({**old, "data": data}, new)


def with_later_settings(old: dict[str, Any], new: dict[str, Any], default: dict[str, Any] | None = None) -> dict[str, Any]:
    """Settings as an earlier version wrote them, with those of `new` that it did not know at their defaults."""
    known: dict[str, Any] = settings_of(Config()) if default is None else default
    filled = dict(old)
    for key, value in new.items():
        if isinstance(value, dict):
            before = old.get(key)
            filled[key] = with_later_settings(before if isinstance(before, dict) else {}, value, known.get(key) or {})
        elif key not in old and key in known:
            filled[key] = known[key]
    return filled


def denoiser_stage(config: Config, dataset: Dataset, name: str = "") -> Config:
    """The first stage of a staged run: all that shapes its denoiser, and nothing else.

    Args:
        config, dataset: As `with_data` gives them.
        name: Of its folder, for networks that settings do not tell apart; made of the settings when empty.
    """
    asked = config.train
    # Where time is given, the steps that fit differ a little each time they are measured: the first run's count for all.
    steps = 1 if asked.minutes else asked.denoiser_steps
    train = TrainConfig(mode="denoiser", steps=steps, minutes=asked.minutes, batch_size=asked.batch_size)
    alone = replace(
        config,
        encoder=EncoderConfig(latent_size=1, channels=[8]),  # a run has one; this one never learns
        kl_weight=KLWeightConfig(),
        sami=SamiConfig(),
        objective=replace(config.objective, free_bits=0.0, unconditional_weight=0.0),
        optimizer=replace(config.optimizer, encoder_lr=0.0),
        train=train,
    )
    # By what differs from the defaults, so that settings which later versions add change no name.
    departures = _departures(lasting_settings(alone, dataset, ""), settings_of(Config()))
    settings = json.dumps(departures | _code(alone, dataset), sort_keys=True)
    name = name or hashlib.sha256(settings.encode()).hexdigest()[:12]
    alone = replace(alone, name=name, runs_dir=str(Path(config.runs_dir) / DENOISERS))
    before = begun(alone) if asked.minutes else None
    return replace(alone, train=replace(train, steps=before.train.steps if before else asked.denoiser_steps))


def _code(config: Config, dataset: Dataset) -> dict[str, str]:
    """The source behind the classes that a first stage depends on and that settings only name; of data, where nothing else tells."""
    named = {"denoiser.class": config.denoiser.class_, "data.class": "" if dataset.fingerprint else config.data.class_}
    return {key: source_digest(spec, key) for key, spec in named.items() if spec}


def _departures(settings: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """Of nested settings those that are not the default."""
    return {
        key: _departures(value, default.get(key, {})) if isinstance(value, dict) else value
        for key, value in settings.items()
        if value != default.get(key)
    }


def with_steps_of(config: Config, other: Config) -> Config:
    """The config with another's steps, which were laid out before."""
    steps = {"steps": other.train.steps, "denoiser_steps": other.train.denoiser_steps}
    return replace(config, train=replace(config.train, **steps))


def begun(config: Config) -> Config | None:
    """The config with which the run in its folder was begun; None where there is none yet."""
    file = config.run_dir / "config.yaml"
    return load_config(str(file)) if file.is_file() else None


def refuse_other_settings(config: Config, dataset: Dataset) -> None:
    """A `UserError` where the run in the config's folder was begun with other settings than a resumed run must share."""
    before = begun(config)
    changed = difference(lasting_settings(before, dataset, ""), lasting_settings(config, dataset, "")) if before else ()
    if changed:
        raise UserError(f"{config.run_dir}: belongs to a run with other settings: {', '.join(changed)}; set name= for a new run")


def is_finished(run_dir: Path) -> bool:
    """Whether a run has left a model."""
    return (run_dir / "model" / "config.json").is_file()


def beside_denoiser(config: Config, dataset: Dataset, name: str = "") -> Config:
    """What follows the first stage of a staged run, as the finetune run that it is; other configs as they are. Arguments as in
    `denoiser_stage`."""
    if config.mode != "staged":
        return config
    denoiser = replace(config.denoiser, pretrained=str(denoiser_stage(config, dataset, name).run_dir))
    return replace(config, train=replace(config.train, mode="finetune"), denoiser=denoiser)


def difference(old: Any, new: Any, prefix: str = "") -> Sequence[str]:
    """Dotted keys in which two nested dicts differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{prefix[:-1]} ({old!r} there, {new!r} here)"]
    return [d for key in sorted({*old, *new}) for d in difference(old.get(key), new.get(key), f"{prefix}{key}.")]
