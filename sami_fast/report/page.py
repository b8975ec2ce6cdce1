"""The report's page: its words, markup and script lie in templates/, its numbers come from here. Every text filled in is escaped."""

import base64
import hashlib
import json
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..config import to_yaml
from ..evaluation import Run
from ..evaluation.table import Scores, lines
from ..latents.sampling import COVERAGE
from ..methods.card import BASELINES
from ..metrics.latents import LIVE_NATS
from .advice import SENTENCES, names_classes, next_commands, run_argument
from .cards import Card, Gallery
from .charts import COLOURS, DARK, MATRIX_ROWS, MAX_AXES
from .sheets import Sheet
from .strips import Strip

FOUND = 0.9  # rank correlation from which a factor counts as found on a latent of its own


@dataclass(frozen=True)
class View:
    """What a page shows of one run."""

    run: Run
    scores: Scores  # what stands in metrics.json
    names: Sequence[str]  # of the factors that vary
    cards: list[Card]
    gallery: Gallery | None
    rows: dict[str, list[Strip]]  # rows of images: reconstructions, samples, axes
    sheets: dict[str, Sheet]  # the pictures of those, and of the cards' "frames"
    charts: dict[str, str] = field(default_factory=dict)  # SVG, by the names of templates/figures.html
    prefix: str = ""  # of what has a name in the page, where it shows several runs

    @property
    def rated(self) -> bool:
        return self.scores["kl_nats"] is not None

    @property
    def found(self) -> list[str]:
        """Factors on a latent of their own."""
        recovered = self.scores.get("mcc_per_factor", {})
        return [name for name in self.names if recovered.get(name, 0) >= FOUND]

    @property
    def sentence(self) -> str:
        """Whether it worked; "" where nothing says so."""
        return SENTENCES.get((self.scores.get("health") or {}).get("word", ""), "")

    @property
    def commands(self) -> list[tuple[str, str]]:
        return next_commands(self.run, self.scores)

    @property
    def beside(self) -> dict[str, float]:
        """The MCC of the run and of what it is compared with; empty where no factors are known."""
        labels = {"this run": self.scores, **{capitalised(label): self.scores.get(key) or {} for key, label in BASELINES.items()}}
        return {label: scores["mcc"] for label, scores in labels.items() if scores.get("mcc") is not None}


def number(value: float | Iterable[float | None] | None, digits: int = 3, unit: str = "") -> str:
    """A number as the page shows it, of several ({factor: value}, or a list) the mean of those known; a dash where there is none."""
    if isinstance(value, Iterable):
        known = [each for each in (value.values() if isinstance(value, Mapping) else value) if each is not None]
        value = mean(known) if known else None
    return "\N{EN DASH}" if value is None else f"{value:.{digits}f}{unit}"


def signed(value: float, digits: int = 1) -> str:
    """A value of a latent: with a minus sign as wide as a plus sign, and no negative zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def thousands(value: int) -> str:
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def depth(scale: float, levels: Sequence[float]) -> str:
    """Where in the range of noise a latent switches on, in words."""
    third = (levels[-1] - levels[0]) / 3
    if scale < levels[0] + third:
        return "coarse: seen through much noise"
    return "between coarse and fine" if scale < levels[-1] - third else "fine: seen only when nearly clean"


def address(svg: str) -> str:
    """A picture that a page holds itself."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


TEMPLATES = Environment(
    loader=PackageLoader("sami_fast.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=["jinja2.ext.do"],
)
SCRIPT = TEMPLATES.get_template("page.js").render()
TEMPLATES.filters |= {
    "number": number,
    "signed": signed,
    "duration": duration,
    "thousands": thousands,
    "capitalised": capitalised,
    "depth": depth,
    "address": address,
}
CONSTANTS: dict[str, Any] = {
    "BASELINES": BASELINES,
    "COLOURS": COLOURS,
    "COVERAGE": f"{COVERAGE:.0%}",
    "DARK": DARK,
    "FOUND": FOUND,
    "LIVE_NATS": f"{LIVE_NATS:g}",
    "MATRIX_ROWS": MATRIX_ROWS,
    "MAX_AXES": MAX_AXES,
    "NATS_PER_BIT": math.log(2),
    "SCRIPT": SCRIPT,
    "SCRIPT_HASH": base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
}
TEMPLATES.globals.update(CONSTANTS)


def command_line(environment: dict[str, Any]) -> str:
    """The command that made the run, as one would type it."""
    command = environment.get("command")
    words = [word for word in map(str, command if isinstance(command, list) else []) if not word.startswith("--local_rank")]
    return shlex.join(["python", *words] if words and words[0].endswith(".py") else words)


def render(view: View) -> str:
    """The whole page of a run, one HTML file that needs nothing else."""
    return TEMPLATES.get_template("page.html").render(
        view=view,
        views=[view],
        run=view.run,
        scores=view.scores,
        names=view.names,
        rated=view.rated,
        folder=run_argument(view.run),
        command=command_line(view.run.environment),
        configuration=to_yaml(view.run.config),
        environment=json.dumps(view.run.environment, indent=2),
    )


def render_comparison(views: Sequence[View]) -> str:
    """The page of several runs side by side, as `render`; each with a prefix of its own."""
    columns = [(view.run.config.name, view.scores) for view in views]
    for view in views:  # principal components of the same images are the same, but for their number
        for key in ("pca", "pixels"):
            if view.scores.get(key):
                columns.append((f"{capitalised(BASELINES[key])} ({view.run.config.name})", view.scores[key]))
    known = max((scores for _, scores in columns), key=lambda scores: len(scores.get("linear_r2") or {}))
    rows = [(label, [_read(read, scores) for _, scores in columns], digits) for label, read, digits in lines(known)]
    return TEMPLATES.get_template("compare.html").render(
        views=views,
        columns=[label for label, _ in columns],
        rows=[row for row in rows if any(value is not None for value in row[1])],
        folders=shlex.join(str(view.run.folder) for view in views),
        trust=any(names_classes(view.run.config) for view in views),
    )


def _read(read: Callable[[Scores], Any], scores: Scores) -> Any:
    """A number of scores; None where runs know other factors."""
    try:
        return read(scores)
    except KeyError:
        return None
