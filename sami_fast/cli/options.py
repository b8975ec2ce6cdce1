"""Kinds of arguments, and the options that several commands share."""

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ..errors import UserError
from ..files import expanded
from ..latents import SOLVERS, STARTS

SEVERAL = "deepspeed -q --num_accelerators {ranks} --module sami_fast.train"  # the command for several processes


class AddCommand(Protocol):
    """Adds a command with the options of its parents."""

    def __call__(
        self, name: str, run: Callable[[argparse.Namespace], int | None], help: str, example: str, *parents: argparse.ArgumentParser
    ) -> argparse.ArgumentParser: ...


def at_least(low: int, high: int = 10**7) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if not text.lstrip("-").isdecimal() or len(text) > 20 or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, found {text!r}")
        return int(text)

    return whole_number


def number(text: str, low: float = -1e6) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"expected a number from {low:g} to 1e6, found {text!r}")
    return value


def non_negative(text: str) -> float:
    return number(text, 0.0)


def limit(text: str) -> float | None:
    return None if text == "off" else non_negative(text)


def path(text: str) -> str:
    try:
        return expanded(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def threads_option() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--threads", type=at_least(1, 1024), metavar="N", help="CPU threads; as many as there are cores when left out")
    return options


@contextmanager
def threads(arguments: argparse.Namespace) -> Iterator[None]:
    """Inside, torch and the matrix products of numpy and scipy have the threads of --threads, where a command has that option and it was
    given."""
    if not getattr(arguments, "threads", None):
        yield
        return
    import scipy.linalg  # noqa: F401  # limits hold for libraries that are loaded: numpy's and scipy's
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        with threadpool_limits(arguments.threads, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; the first GPU, if there is one, when left out")


def device_options() -> argparse.ArgumentParser:
    """Where a command's model runs: of every command that runs one."""
    options = argparse.ArgumentParser(add_help=False, parents=[threads_option()])
    add_device(options)
    return options


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `sami-fast train` and of the script alike."""
    parser.add_argument("--config", help="a YAML file, or the name of a config that comes with the package (disks)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ, dotted keys: train.steps=50")
    parser.add_argument("--resume", action="store_true", help="continue from the newest whole checkpoint, if there is one")
    parser.add_argument("--overwrite", action="store_true", help="replace the run folder")
    parser.add_argument("--no-report", action="store_true", help="end with the model; `sami-fast report` writes the report later")
    parser.add_argument("--dry-run", action="store_true", help="say what the run would do, take and write, and stop")
    parser.add_argument("--verbose", action="store_true", help="with --dry-run: also every setting, and those of DeepSpeed, if any")
    parser.add_argument("--settings", action="store_true", help="print every setting with its meaning, unit and default, and stop")
    parser.add_argument("--threads", dest="cpu_threads", type=at_least(1, 1024), metavar="N", help="CPU threads: engine.threads=N")
    add_device(parser)
    parser.add_argument(
        "--num_accelerators", "--num_gpus", dest="ranks", type=at_least(1), metavar="N", help="several processes: says the command for them"
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it


def trust_option() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--trust", action="store_true", help="import the classes that the run names, networks or data, which runs their code"
    )
    return options


def saved_model_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False, parents=[trust_option()])
    options.add_argument("run", type=path, help="a run folder, or a saved model (config.json, model.safetensors)")
    options.add_argument("--output", type=path, required=True, metavar="FILE", help="file to write; refused if it exists")
    options.add_argument("--overwrite", action="store_true", help="replace the output file")
    return options


def model_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False, parents=[saved_model_options(), device_options()])
    options.add_argument(
        "--batch-size", type=at_least(1), default=64, metavar="N", help="images at a time (%(default)s); bounds the memory"
    )
    return options


def data_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--data", type=path, metavar="FILE", help=".npy or .npz of images, or a folder; the run's own evaluation images when left out"
    )
    options.add_argument("--array-key", default="", metavar="NAME", help="entry of an .npz; the only one, or 'images', when left out")
    options.add_argument(
        "--range", choices=("unit", "signed"), help="floats of a file lie in [0, 1] or in [-1, 1]; as the run's data.range, when left out"
    )
    return options


def axes_options(what: str = "the latent dimensions when left out") -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--axes", type=path, metavar="FILE", help=f"named directions (.npz); {what}")
    return options


def start_options(default: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--x-T",
        choices=STARTS,
        default=default,
        help="starting noise: drawn with --seed, or what the denoiser alone makes the image from, which implies --eta 0 (%(default)s)",
    )
    return options


def sampler_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--seed", type=at_least(0, 2**63 - 1), default=0, help="of all noise (%(default)s)")
    options.add_argument(
        "--solver",
        choices=SOLVERS,
        default="ddim",
        help="ddim with fresh noise by --eta, ancestral: the same at --eta 1, dpm2m: second order, no fresh noise (%(default)s)",
    )
    options.add_argument("--steps", type=at_least(1), default=50, metavar="N", help="denoising steps (%(default)s)")
    options.add_argument("--guidance-scale", type=non_negative, default=1.0, metavar="S", help="1 is Bayes' rule, 0 is off (%(default)s)")
    options.add_argument(
        "--guidance-clip",
        type=limit,
        default=4.0,
        metavar="C",
        help="standard deviations beyond which a latent is not pulled harder, or off (%(default)s)",
    )
    options.add_argument(
        "--eta",
        type=non_negative,
        metavar="E",
        help="fresh noise of --solver ddim: 0 is DDIM, 1 ancestral sampling; 2 with latents and 1 without, if left out",
    )
    return options


def sampler_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """`SamplerOptions` of the command line, checked before any work is done; x_T too where the command has it."""
    from ..latents.sampling import resolve_eta

    start = {"x_T": arguments.x_T} if "x_T" in arguments else {}
    try:
        resolve_eta(arguments.solver, arguments.eta, **start)
    except ValueError as error:  # speaks of arguments; the user gave options
        name, _, rest = str(error).partition(": ")
        raise UserError(f"--{name}: {rest.replace('x_T ', '--x-T ').replace('solver ', '--solver ')}") from None
    return start | {
        "solver": arguments.solver,
        "num_steps": arguments.steps,
        "guidance_scale": arguments.guidance_scale,
        "guidance_clip": arguments.guidance_clip,
        "eta": arguments.eta,
        "batch_size": arguments.batch_size,
    }
