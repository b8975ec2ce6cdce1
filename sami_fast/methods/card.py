"""The README.md of a model that is shared: what it is, how it is loaded, how its run went."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .. import __version__
from ..adapters import named_classes
from ..errors import UserError, printable
from ..files import absent, open_regular, write_text_whole
from ..saved import read_settings

if TYPE_CHECKING:
    from .latent_model import LatentModel

NAME = "README.md"
MOST_CONFIG = 2**20  # bytes
PLACES = ("runs_dir", "path", "labels", "cache_dir")  # settings that only say where files lie on the machine of the run
BASELINES = {"untrained": "untrained encoder", "pca": "PCA", "pixels": "pixels"}  # what a run is scored beside, by key
SKIPPED = (*BASELINES, "axes")  # scores of something else


def write_card(model: "LatentModel", folder: Path, run: Path | None, repo_id: str | None = None, variant: str | None = None) -> None:
    """Write a model card into the folder of a saved model.

    Args:
        model: What was saved.
        folder: Where.
        run: The run folder that it comes from, whose config and report are in the card; None where there is none.
        repo_id: Where on the hub it will lie.
        variant: Of its files of weights.
    Raises:
        UserError: no such run, or its files cannot be read.
        OSError: from the system.
    """
    scores: dict[str, Any] = {}
    config = ""
    if run is not None:
        if not (run / "config.yaml").is_file():
            raise UserError(f"{run}: expected a run folder for the model card; {absent(run / 'config.yaml', 'file')}")
        config = _config(run / "config.yaml")
        if (run / "report" / "metrics.json").is_file():
            scores = read_settings(run / "report" / "metrics.json")
    options = ", trust_remote_code=True" if named_classes(model.architecture or {}) else ""
    options += f", variant={json.dumps(variant)}" if variant else ""
    load = f"load_model({json.dumps(repo_id or 'this/folder')}{options})"
    name = repo_id or (model.label if run is None else run.resolve().name)
    write_text_whole(folder / NAME, "\n".join(_lines(model, config, scores, name, load)))


def _lines(model: "LatentModel", config: str, scores: Mapping[str, Any], name: str, load: str) -> Iterator[str]:
    channels, height, width = model.image_shape
    tags = ["sami-fast", model.method, "representation-learning", "disentanglement", *(["diffusion"] if model.noisy else [])]
    yield "---"
    yield yaml.safe_dump({"library_name": "sami-fast", "tags": tags}, sort_keys=False).rstrip()
    yield "---"
    yield f"# {escaped(name)}"
    yield ""
    yield (
        f"A model of the method {escaped(model.label)}: {model.latent_size} latents of images of {channels} x {height} x {width} "
        f"(channels, height, width), trained with sami-fast {__version__}."
    )
    yield ""
    yield "```python"
    yield "from sami_fast import load_model, reconstruct"
    yield ""
    yield f"model = {load}"
    yield "posterior = model.encode(images)  # mu and var, [B, Z]; images in [-1, 1], or uint8"
    yield "again = reconstruct(model, images, seed=0)"
    yield "```"
    if isinstance(health := scores.get("health"), dict):
        yield ""
        yield f"**Health of the run:** {escaped(health.get('word', ''))}: {escaped(health.get('reason', ''))}"
    beside = {key: label[:1].upper() + label[1:] for key, label in BASELINES.items() if isinstance(scores.get(key), dict)}
    if table := list(_table(scores, beside)):
        yield from ("", "## Scores", "", "On held-out images where there are any. What each means: the documentation of sami-fast.", "")
        yield f"| {' | '.join(['Score', 'This model', *beside.values()])} |"
        yield "| --- |" + " --- |" * (1 + len(beside))
        yield from table
    if config:
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", config)), default=0))
        yield from ("", "## Config", "", f"{fence}yaml", config, fence)
    yield ""


def _table(scores: Mapping[str, Any], beside: Iterable[str]) -> Iterator[str]:
    """Every single number of a report, and the mean of those by factor, beside what others score of it."""
    for name, value in scores.items():
        if name not in SKIPPED and (own := _mean(value)) is not None:
            cells = [own, *(_mean(scores[key].get(name)) for key in beside)]
            shown = [escaped(name + (", mean" if isinstance(value, dict) else "")), *("" if n is None else f"{n:.4g}" for n in cells)]
            yield f"| {' | '.join(shown)} |"


def _mean(value: Any) -> float | None:
    """A number, or the mean of one for each factor; None of anything else."""
    known = list(value.values()) if isinstance(value, dict) else [value]
    return sum(known) / len(known) if known and all(map(_is_number, known)) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _config(file: Path) -> str:
    """A run's config without the places of its files, which are nobody else's business."""
    try:
        with open_regular(file) as stream:
            settings = yaml.safe_load(stream.read(MOST_CONFIG))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    return yaml.safe_dump(_without_places(settings), sort_keys=False, allow_unicode=True).rstrip()


def _without_places(settings: Any) -> Any:
    if not isinstance(settings, dict):
        # what remains of a path is its last part; a model of the hub is no path
        return Path(settings).name if isinstance(settings, str) and Path(settings).is_absolute() else settings
    return {key: _without_places(value) for key, value in settings.items() if key not in PLACES}


def escaped(text: object) -> str:
    """Text as Markdown shows it: on one line, without markup of its own."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$])", r"\\\1", printable(text))
