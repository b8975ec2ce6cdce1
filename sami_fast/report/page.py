"""The report's page: its words and its markup lie in templates/, its numbers come from here. Every text that is filled in is escaped."""

import base64
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..config import to_yaml
from ..evaluation import Run
from ..evaluation.table import Scores
from ..metrics.latents import LIVE_NATS
from .charts import MATRIX_ROWS, MAX_AXES
from .strips import COVERAGE

FOUND = 0.9  # rank correlation from which a factor counts as found on a latent of its own


def number(value: float | Iterable[float | None] | None, digits: int = 3, unit: str = "") -> str:
    """A number as the page shows it, of several ({factor: value}, or a list) the mean of those known; a dash where there is none."""
    if isinstance(value, Iterable):
        known = [each for each in (value.values() if isinstance(value, Mapping) else value) if each is not None]
        value = mean(known) if known else None
    return "\N{EN DASH}" if value is None else f"{value:.{digits}f}{unit}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


TEMPLATES = Environment(
    loader=PackageLoader("sami_fast.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=["jinja2.ext.do"],
)
TEMPLATES.filters |= {"number": number, "duration": duration, "capitalised": capitalised}
CONSTANTS: dict[str, Any] = {
    "COVERAGE": f"{COVERAGE:.0%}",
    "FOUND": FOUND,
    "LIVE_NATS": f"{LIVE_NATS:g}",
    "MATRIX_ROWS": MATRIX_ROWS,
    "MAX_AXES": MAX_AXES,
    "NATS_PER_BIT": math.log(2),
}
TEMPLATES.globals.update(CONSTANTS)


def command_line(environment: dict[str, Any]) -> str:
    """The command that made the run, as one would type it."""
    command = environment.get("command")
    words = [word for word in map(str, command if isinstance(command, list) else []) if not word.startswith("--local_rank")]
    return shlex.join(["python", *words] if words and words[0].endswith(".py") else words)


def embedded(png: bytes) -> dict[str, int | str]:
    """Attributes of an `img` that holds the picture itself, shown at half the size it was drawn at."""
    # A PNG's first chunk begins with width and height.
    width, height = (int.from_bytes(png[start : start + 4], "big") // 2 for start in (16, 20))
    return {"width": width, "height": height, "src": "data:image/png;base64," + base64.b64encode(png).decode()}


def render(run: Run, scores: Scores, names: Sequence[str], pictures: dict[str, bytes]) -> str:
    """The whole page, one HTML file that needs nothing else.

    Args:
        run: The run.
        scores: What stands in metrics.json.
        names: Of the factors that vary.
        pictures: PNG files by the names that templates/figures.html gives them.
    """
    recovered = scores.get("mcc_per_factor", {})
    return TEMPLATES.get_template("page.html").render(
        run=run,
        scores=scores,
        names=names,
        found=[name for name in names if recovered.get(name, 0) >= FOUND],
        rated=scores["kl_nats"] is not None,
        pictures={name: embedded(png) for name, png in pictures.items()},
        held_out=run.evaluation.held_out,
        folder=shlex.quote(str(run.folder)),
        command=command_line(run.environment),
        configuration=to_yaml(run.config),
        environment=json.dumps(run.environment, indent=2),
    )
