"""The `sami-fast` command: what one does with a trained model.

Exit status: 0 done, 2 something the user gave cannot work (one sentence on stderr), 130 interrupted.
Torch is imported only once a command needs it.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .errors import UserError
from .files import write_whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .config import Config
    from .data import Dataset
    from .sami import Sami

PICTURES = (".png", ".npz")
RECONSTRUCTIONS = 16  # images, unless --count says otherwise
REFERENCE_IMAGES = 1000  # of the aggregated posterior behind a traversal: enough for its live axes and their ranges
ROW = 12  # images in a row of reconstructions
CONTACTS = 64  # images of a contact sheet


def _at_least(low: int, high: int = 10**7) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if not text.lstrip("-").isdecimal() or len(text) > 20 or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, found {text!r}")
        return int(text)

    return whole_number


def _non_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1e6, found {text!r}")
    return value


def _limit(text: str) -> float | None:
    return None if text == "off" else _non_negative(text)


def _output(arguments: argparse.Namespace, endings: tuple[str, ...]) -> Path:
    """The file to write, checked before any work is done."""
    path = Path(arguments.output)
    if path.suffix not in endings:
        raise UserError(f"--output: expected a name ending in {' or '.join(endings)}, found {path}")
    if not path.parent.is_dir():
        raise UserError(f"--output: no folder {path.parent}")
    if path.is_dir() or (path.exists() and not arguments.overwrite):
        raise UserError(f"--output: {path} exists; choose another name" + ("" if path.is_dir() else " or add --overwrite"))
    return path


def _write(path: Path, write: Callable[[BinaryIO], None]) -> None:
    try:
        write_whole(path, write)
    except OSError as error:
        raise UserError(f"--output: cannot write {path} ({error.strerror or error})") from None


def _write_arrays(path: Path, **arrays: Any) -> None:
    import numpy as np

    _write(path, lambda stream: np.savez(stream, **{name: np.asarray(values) for name, values in arrays.items()}))


def _write_pictures(path: Path, grid: "Tensor", columns: int, **arrays: Any) -> None:
    """A PNG of the grid, or an NPZ of the arrays, as the name says."""
    from .images import image_grid, write_png

    if path.suffix == ".npz":
        _write_arrays(path, **arrays)
    else:
        _write(path, lambda stream: write_png(stream, image_grid(grid, columns)))


def _device(name: str | None) -> "torch.device":
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except Exception as error:  # unknown name, no such device, a torch built without it: every backend has its own kind
        raise UserError(f"--device: {name} cannot be used here ({str(error).splitlines()[0][:120]})") from None
    return device


def _model(arguments: argparse.Namespace) -> "Sami":
    folder = Path(arguments.run)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a run folder or a saved model")
    device = _device(arguments.device)
    from .sami import Sami

    return Sami.from_pretrained(folder, device)


def _config(arguments: argparse.Namespace) -> "Config":
    """What the run was trained with."""
    from .config import load_config

    file = Path(arguments.run) / "config.yaml"
    if not file.is_file():
        raise UserError(f"--data: {arguments.run} has no config.yaml that says which images belong to it; name a file of images")
    return load_config(str(file))


def _dataset(arguments: argparse.Namespace, sami: "Sami") -> "Dataset":
    """The images of --data, or the run's own that training never saw."""
    from .data import ArrayImages, ImageFolder, VideoFolder, open_dataset

    if arguments.data:
        try:
            if Path(arguments.data).is_dir():
                file = Path(arguments.run) / "config.yaml"
                videos = file.is_file() and _config(arguments).data.kind == "video_folder"
                channels, size, _ = sami.image_shape
                folder = VideoFolder if videos else ImageFolder
                dataset: Dataset = folder(arguments.data, image_size=size, channels=channels, holdout=0.0)
            else:
                dataset = ArrayImages(arguments.data, arguments.array_key, holdout=0.0)
        except UserError as error:  # speaks of the settings of a run; the user gave options
            raise UserError(str(error).replace("data.path", "--data").replace("data.array_key", "--array-key")) from None
    else:
        config = _config(arguments)
        dataset = open_dataset(config.data, config.seed, split=1)
    if dataset.image_shape != sami.image_shape:
        raise UserError(
            f"{arguments.data or arguments.run}: expected images of shape {list(sami.image_shape)} (C, H, W) for this model, "
            f"found {list(dataset.image_shape)}"
        )
    return dataset


def _count(dataset: "Dataset", asked: int | None, default: int) -> int:
    """As many as asked for, else `default` or as many as there are."""
    size = math.inf if dataset.size is None else dataset.size
    if asked is not None and asked > size:
        raise UserError(f"--count: expected at most {size}, the number of images there are, found {asked}")
    return asked or int(min(default, size))


def _sampler_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "num_steps": arguments.steps,
        "guidance_scale": arguments.guidance_scale,
        "guidance_clip": arguments.guidance_clip,
        "eta": arguments.eta,
        "batch_size": arguments.batch_size,
    }


def run_env(arguments: argparse.Namespace) -> None:
    from .environment import describe

    facts = describe()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            print(name)
            for key, entry in value.items():
                print(f"  {key:<24} {_readable(entry)}")
        else:
            print(f"{name:<26} {_readable(value)}")


def _readable(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_readable(entry)}" for key, entry in value.items())
    return "none" if value is None else str(value)


def run_data(arguments: argparse.Namespace) -> None:
    output = _output(arguments, (".png",)) if arguments.output else None
    import torch

    from .config import load_config
    from .data.summary import summarize, throughput

    config = load_config(arguments.config, arguments.overrides)
    facts, dataset = summarize(config)
    if arguments.seconds:
        facts["feed alone"] = throughput(config, arguments.seconds)
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        for name, value in facts.items():
            lines = value if isinstance(value, list) else [value]
            print("\n".join(f"{name if not row else '':<18} {line}" for row, line in enumerate(lines)))
    if output:
        count = _count(dataset, arguments.count, CONTACTS)
        images = dataset.images(torch.arange(count))
        _write_pictures(output, images, math.ceil(math.sqrt(count)), images=images)
        print(f"{output}: {count} images of training", file=sys.stderr if arguments.json else sys.stdout)


def run_encode(arguments: argparse.Namespace) -> None:
    output = _output(arguments, (".npz",))
    import torch

    from .sampling import encode

    sami = _model(arguments)
    dataset = _dataset(arguments, sami)
    default = _config(arguments).report.images if dataset.size is None else dataset.size
    index = torch.arange(_count(dataset, arguments.count, default))
    parts = [encode(sami, dataset.images(part), arguments.batch_size) for part in index.split(arguments.batch_size)]
    arrays = {"mu": torch.cat([part.mu for part in parts]).cpu(), "var": torch.cat([part.var for part in parts]).cpu()}
    if dataset.factor_names:
        arrays |= {"factors": dataset.factors(index), "factor_names": list(dataset.factor_names)}
    if hasattr(dataset, "sources"):
        arrays |= dataset.sources(index)
    _write_arrays(output, **arrays)
    print(f"{output}: {', '.join(arrays)} of {len(index)} images, {arrays['mu'].shape[1]} latent dimensions")


def run_sample(arguments: argparse.Namespace) -> None:
    output = _output(arguments, PICTURES)
    import torch

    from . import sampling

    if arguments.data and arguments.source != "posterior":
        raise UserError(f"--data: only --source posterior takes latents from images, and --source is {arguments.source}")
    sami = _model(arguments)
    count, seed = arguments.count, arguments.seed
    arrays = {}
    if arguments.source == "prior":
        arrays["z"] = sampling.prior_latents(sami, count, seed)
    elif arguments.source == "posterior":
        dataset = _dataset(arguments, sami)
        x_0 = dataset.images(torch.arange(_count(dataset, count, count)))
        arrays["z"] = sampling.posterior_latents(sami, x_0, seed=seed)
    images = sampling.sample(sami, count, seed=seed, z=arrays.get("z"), **_sampler_options(arguments))
    arrays = {name: value.cpu() for name, value in {"images": images, **arrays}.items()}
    _write_pictures(output, images, math.ceil(math.sqrt(count)), **arrays)
    print(f"{output}: {count} image(s)")


def run_reconstruct(arguments: argparse.Namespace) -> None:
    output = _output(arguments, PICTURES)
    import torch
    from torch.nn.functional import pad

    from . import sampling

    sami = _model(arguments)
    dataset = _dataset(arguments, sami)
    count = _count(dataset, arguments.count, RECONSTRUCTIONS)
    x_0 = dataset.images(torch.arange(count))
    images = sampling.reconstruct(sami, x_0, seed=arguments.seed, **_sampler_options(arguments)).cpu()
    # Each row of inputs stands above the row of their reconstructions; the last pair of rows is filled up with white.
    columns = min(count, ROW)
    padded = pad(torch.stack((x_0, images)), (0, 0, 0, 0, 0, 0, 0, -count % columns), value=1.0)
    rows = padded.unflatten(1, (-1, columns)).transpose(0, 1)  # [rows, 2, columns, C, H, W]
    _write_pictures(output, rows.flatten(0, 2), columns, images=x_0, reconstructions=images)
    print(f"{output}: {count} images and their reconstructions, mean squared error {(images - x_0).square().mean():.4f}")


def run_traverse(arguments: argparse.Namespace) -> None:
    output = _output(arguments, PICTURES)
    import torch

    from . import sampling
    from .metrics.latents import LIVE_NATS, kl_per_dim, live_dims

    sami = _model(arguments)
    dataset = _dataset(arguments, sami)
    wrong = [axis for axis in arguments.axis or [] if axis >= sami.latent_size]
    if wrong:
        raise UserError(f"--axis: expected 0 to {sami.latent_size - 1}, found {wrong[0]}")
    if dataset.size is not None and arguments.image >= dataset.size:
        raise UserError(f"--image: expected 0 to {dataset.size - 1}, found {arguments.image}")
    reference = torch.arange(_count(dataset, None, REFERENCE_IMAGES))
    posterior = sampling.encode(sami, dataset.images(reference))
    mu, var = posterior.mu.cpu(), posterior.var.cpu()
    axes = arguments.axis or live_dims(kl_per_dim(mu.numpy(), var.numpy())).tolist()
    if not axes:
        raise UserError(f"--axis: no latent dimension is live (mean KL above {LIVE_NATS:g} nats) on these images; name those to move")
    x_0 = dataset.images(torch.tensor([arguments.image]))
    values = [sampling.axis_values(mu, axis, arguments.values) for axis in axes]
    strips = [
        sampling.traverse(sami, x_0, axis, moved, seed=arguments.seed, **_sampler_options(arguments)).cpu()
        for axis, moved in zip(axes, values, strict=True)
    ]
    images = torch.stack(strips)  # [axes, values, C, H, W]
    _write_pictures(output, images.flatten(0, 1), arguments.values, images=images, axes=axes, values=torch.stack(values))
    for row, (axis, moved) in enumerate(zip(axes, values, strict=True)):
        print(f"row {row}: axis {axis}, from {moved[0]:.2f} to {moved[-1]:.2f}")
    print(f"{output}: {len(axes)} row(s) of {arguments.values} values")


def run_report(arguments: argparse.Namespace) -> None:
    from .report import write_report

    print(write_report(Path(arguments.run)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sami-fast",
        description="Use a trained SAMI model. Training itself: deepspeed sami_fast/train.py --help.",
        epilog="example: sami-fast traverse runs/disks --output traversals.png",
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("run", help="a run folder, or a saved model (config.json, model.safetensors)")
    model.add_argument("--output", required=True, metavar="FILE", help="file to write; refused if it exists")
    model.add_argument("--overwrite", action="store_true", help="replace the output file")
    model.add_argument("--batch-size", type=_at_least(1), default=64, metavar="N", help="images at a time (%(default)s); bounds the memory")
    model.add_argument("--device", help="cpu, cuda, cuda:1 ...; the first GPU, if there is one, when left out")

    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--data", metavar="FILE", help=".npy or .npz of images, or a folder; the run's own evaluation images when left out")
    data.add_argument("--array-key", default="", metavar="NAME", help="entry of an .npz; the only one, or 'images', when left out")

    sampler = argparse.ArgumentParser(add_help=False)
    sampler.add_argument("--seed", type=_at_least(0, 2**63 - 1), default=0, help="of all noise (%(default)s)")
    sampler.add_argument("--steps", type=_at_least(1), default=50, metavar="N", help="denoising steps (%(default)s)")
    sampler.add_argument("--guidance-scale", type=_non_negative, default=1.0, metavar="S", help="1 is Bayes' rule, 0 is off (%(default)s)")
    sampler.add_argument(
        "--guidance-clip",
        type=_limit,
        default=4.0,
        metavar="C",
        help="standard deviations beyond which a latent is not pulled harder, or off (%(default)s)",
    )
    sampler.add_argument(
        "--eta",
        type=_non_negative,
        metavar="E",
        help="fresh noise: 0 is DDIM, 1 ancestral sampling; 2 with latents and 1 without, if left out",
    )

    def command(name: str, run: Callable[[argparse.Namespace], None], help: str, example: str, *parents: argparse.ArgumentParser) -> Any:
        added = commands.add_parser(name, parents=parents, help=help, description=help, epilog=f"example: sami-fast {example}")
        added.set_defaults(run_command=run)
        return added

    env = command("env", run_env, "print versions, hardware and which implementation each op would run", "env --json")
    env.add_argument("--json", action="store_true", help="print JSON")

    data_command = command(
        "data",
        run_data,
        "show what a config will feed: counts, sizes, codecs, who decodes each file and why, the feed's speed, a contact sheet",
        "data video data.path=clips --output contact_sheet.png",
    )
    data_command.add_argument("config", help="a YAML file, or the name of a config that comes with the package")
    data_command.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ: data.path=photos")
    data_command.add_argument("--output", metavar="FILE", help="PNG of the first training images")
    data_command.add_argument("--overwrite", action="store_true", help="replace the PNG")
    data_command.add_argument("--count", type=_at_least(1), metavar="N", help=f"images on it ({CONTACTS})")
    data_command.add_argument("--seconds", type=_non_negative, default=3.0, metavar="S", help="time the feed alone so long (%(default)s)")
    data_command.add_argument("--json", action="store_true", help="print JSON")

    encode = command(
        "encode",
        run_encode,
        "write mu and var [N, Z] of images, and their factors where they are known",
        "encode runs/disks --data photos.npy --output latents.npz",
        model,
        data,
    )
    encode.add_argument("--count", type=_at_least(1), metavar="N", help="the first N images; all of a file when left out")

    sample = command("sample", run_sample, "draw new images", "sample runs/disks --count 64 --output samples.png", model, data, sampler)
    sample.add_argument("--count", type=_at_least(1), default=16, metavar="N", help="images (%(default)s)")
    sample.add_argument(
        "--source",
        choices=("prior", "posterior", "none"),
        default="prior",
        help="latents from N(0, I), from q(z|x) of images, or none: the denoiser alone (%(default)s)",
    )

    reconstruct = command(
        "reconstruct",
        run_reconstruct,
        "encode images and draw them again from their latents and fresh noise",
        "reconstruct runs/disks --count 24 --output reconstructions.png",
        model,
        data,
        sampler,
    )
    reconstruct.add_argument("--count", type=_at_least(1), metavar="N", help=f"the first N images ({RECONSTRUCTIONS})")

    traverse = command(
        "traverse",
        run_traverse,
        "move one latent dimension over the range it has on images, all else and the noise held fixed; a row per dimension",
        "traverse runs/disks --axis 2 5 --output traversals.png",
        model,
        data,
        sampler,
    )
    traverse.add_argument("--axis", type=_at_least(0), nargs="+", metavar="D", help="dimensions to move; every live one when left out")
    traverse.add_argument("--values", type=_at_least(2), default=9, metavar="N", help="images per dimension (%(default)s)")
    traverse.add_argument("--image", type=_at_least(0), default=0, metavar="I", help="the image to start from (%(default)s)")

    report = command("report", run_report, "score a finished run and write its report/ folder", "report runs/disks")
    report.add_argument("run", help="a run folder")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status; wrong usage exits with status 2 from here."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run_command(arguments)
    except (UserError, OSError) as error:  # OSError: a name too long, no permission; the system's own words
        print(f"sami-fast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sami-fast: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
