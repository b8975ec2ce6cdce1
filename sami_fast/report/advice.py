"""What a reader is told first: whether the run worked, in one sentence, and the command to type next."""

import shlex
from collections.abc import Sequence

from ..config import Config, load_config
from ..errors import UserError
from ..evaluation import Run
from ..evaluation.health import mended
from ..evaluation.table import Scores

SENTENCES = {
    "healthy": "It worked: the latents tell images apart, and the model uses them.",
    "collapsed": "It did not work: the latents say nothing about the images.",
    "tilted": "It nearly worked: the latents hold the known factors, but several factors share a latent.",
    "undertrained": "It is not done: the latents were still learning when training ended.",
    "overlooking": "It did not work as meant: the latents tell of details, and not of what is largest in the images.",
    "redundant": "It worked in part: some latents say what others say already, or the model does without them.",
    "repairing the denoiser": "It did not work as meant: the latents mend the denoiser's faults instead of describing the images.",
}
TRAIN = "sami-fast train"


def _trained_again(run: Run, settings: Sequence[str]) -> str | None:
    """The command that trains a run like this one with other settings, under a name of its own; None where no command can."""
    file = run.folder / "config.yaml"
    asked = [f"name={run.config.name}_next", *settings]
    try:
        load_config(str(file), asked)
    except UserError:  # settings that do not go together, or something of this run that only its program knows
        return None
    if not settings:
        return None
    return f"{TRAIN} {shlex.join(['--config', str(file), *asked])}"


def names_classes(config: Config) -> bool:
    """Whether a run's commands are asked for --trust."""
    return any(part.class_ for part in (config.data, config.encoder, config.denoiser))


def run_argument(run: Run) -> str | None:
    """How a command is told of a run: its folder, and leave to import the classes that it names; None of a run that was given Python
    objects, which no command has."""
    if run.config.data.kind == "given" or run.model.architecture is None:
        return None
    return shlex.quote(str(run.folder)) + (" --trust" if names_classes(run.config) else "")


def next_commands(run: Run, scores: Scores) -> list[tuple[str, str]]:
    """What to do next: in words, and as a command that can be copied; nothing where no command can.

    Args:
        run: The run.
        scores: What stands in its metrics.json.
    """
    word = (scores.get("health") or {}).get("word")
    if (folder := run_argument(run)) is None:
        return []
    again = _trained_again(run, mended(run.config, word, scores["active_dims"])) if word else None
    commands = [("train again with what usually mends this", again)] if again else []
    if word == "tilted":
        commands.append(("or find directions that do not mix, without training", f"sami-fast axes {folder} --output axes.npz"))
    if word == "healthy" or (word is None and scores["active_dims"]):
        commands.append(("use it: the latents of your images, as arrays", f"sami-fast encode {folder} --output latents.npz"))
    return commands
