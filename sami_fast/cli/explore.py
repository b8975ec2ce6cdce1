"""The command that opens a page: explore."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..files import absent, read_json
from ..progress import bar
from .files import open_images, open_model, run_config
from .options import AddCommand, at_least, data_options, device_options, path, trust_option

if TYPE_CHECKING:
    from ..methods.latent_model import LatentModel

PORT = 8765


def run_explore(arguments: argparse.Namespace) -> None:
    try:
        from ..explore.server import address_of, is_loopback, listen, serve
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise UserError(f"explore needs {error.name}: `pip install 'sami-fast[explore]'`") from None
    from ..explore.explorer import REFERENCE_IMAGES, Explorer

    if not (run := Path(arguments.run)).is_dir():
        raise UserError(f"{absent(run, 'folder')}; expected a run folder or a saved model")
    axes_file = Path(arguments.axes or run / "axes.npz")
    if not axes_file.parent.is_dir():
        raise UserError(f"--axes: {absent(axes_file.parent, 'folder')}")
    port = PORT if arguments.port is None else arguments.port
    with listen(arguments.host, port, another=arguments.port is None) as sock:
        model = open_model(arguments)
        with bar(REFERENCE_IMAGES, "held-out images", "images") as seen:
            explorer = Explorer(
                model,
                run.resolve().name,
                axes_file,
                information=_information(run, model),
                steps=arguments.steps,
                progress=seen.update,
                **_data(arguments, model),
            )
        if port and sock.getsockname()[1] != port:
            print(f"port {port} is in use, so it is another one")
        if not is_loopback(sock):
            print(f"whoever reaches {arguments.host} can use it: look at the held-out images, run the model, write the axes file")
        print(f"{address_of(arguments.host, sock)}   (Ctrl-C ends it)", flush=True)
        serve(explorer, arguments.host, sock)


def _data(arguments: argparse.Namespace, model: "LatentModel") -> dict[str, Any]:
    """The images that are offered and how the run cut its own; without its data one's own images can be explored all the same."""
    try:
        dataset = open_images(arguments, model)
    except UserError as error:
        if arguments.data:
            raise
        return {"missing": str(error)}
    settings = run_config(arguments).data if (Path(arguments.run) / "config.yaml").is_file() else None
    return {"dataset": dataset, "crop": settings.celeba.crop if settings and settings.kind == "celeba" else "center"}


def _information(run: Path, model: "LatentModel") -> list[float] | None:
    """Nats in each latent, as the run's report says it; None where there is no report of this model."""
    from ..metrics.checks import LARGEST

    try:
        found = read_json(run / "report/metrics.json")["information_per_dim"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    known = isinstance(found, list) and len(found) == model.latent_size and not model.deterministic
    return found if known and all(isinstance(each, int | float) and abs(each) <= LARGEST for each in found) else None


def add_commands(command: AddCommand) -> None:
    explore = command(
        "explore",
        run_explore,
        "open a local page: drop an image in, move its latents with sliders, watch the picture change, name axes",
        "explore runs/disks --port 8765",
        trust_option(),
        data_options(),
        device_options(),
    )
    explore.add_argument("run", type=path, help="a run folder, or a saved model (config.json, model.safetensors)")
    explore.add_argument("--port", type=at_least(0, 65535), metavar="N", help=f"{PORT}, or another where it is in use, when left out")
    explore.add_argument(
        "--host", default="127.0.0.1", metavar="NAME", help="address to listen at; any but %(default)s lets others in (%(default)s)"
    )
    explore.add_argument(
        "--axes", type=path, metavar="FILE", help="named directions (.npz) to load and to save to; axes.npz in the run when left out"
    )
    explore.add_argument(
        "--steps", type=at_least(1, 1000), default=50, metavar="N", help="denoising steps of a finished picture (%(default)s)"
    )
