"""Commands that draw images: sample, reconstruct, traverse, interpolate, edit."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, printable
from .files import (
    image_count,
    in_rows,
    numbered,
    open_axes,
    open_images,
    open_sampler,
    output_file,
    run_config,
    write_pictures,
)
from .options import (
    AddCommand,
    at_least,
    axes_options,
    data_options,
    model_options,
    number,
    sampler_arguments,
    sampler_options,
    start_options,
)

if TYPE_CHECKING:
    from ..latents.axes import Axes
    from ..methods.latent_model import LatentModel

PICTURES = (".png", ".npz")
RECONSTRUCTIONS = 16  # images, unless --count says otherwise
ROW = 12  # images in a row of reconstructions


def _known_axes(picked: list[int], model: "LatentModel", axes: "Axes | None") -> None:
    last = (len(axes.names) if axes else model.latent_size) - 1
    if wrong := [axis for axis in picked if axis > last]:
        raise UserError(f"--axis: expected 0 to {last}, found {wrong[0]}")


def run_sample(arguments: argparse.Namespace) -> None:
    output = output_file(arguments, PICTURES)
    import torch

    from ..latents import sampling

    options = sampler_arguments(arguments)
    if arguments.data and arguments.source != "posterior":
        raise UserError(f"--data: only --source posterior takes latents from images, and --source is {arguments.source}")
    model = open_sampler(arguments)
    count, seed = arguments.count, arguments.seed
    arrays = {}
    if arguments.source == "prior" and model.deterministic:
        raise UserError(f"{arguments.run}: a deterministic encoder has no prior to draw from; use --source posterior")
    if arguments.source == "prior":
        arrays["z"] = sampling.prior_latents(model, count, seed)
    elif arguments.source == "posterior":
        dataset = open_images(arguments, model)
        x_0 = dataset.images(torch.arange(image_count(dataset, count, count)))
        arrays["z"] = sampling.posterior_latents(model, x_0, seed=seed)
    images = sampling.sample(model, count, seed=seed, z=arrays.get("z"), **options)
    arrays = {name: value.cpu() for name, value in {"images": images, **arrays}.items()}
    write_pictures(output, in_rows(arrays["images"], [str(number) for number in range(count)]), **arrays)
    print(f"{output}: {count} image(s)")


def run_reconstruct(arguments: argparse.Namespace) -> None:
    output = output_file(arguments, PICTURES)
    import torch

    from ..data.dataset import image_names
    from ..latents import sampling
    from ..report.strips import Strip

    options = sampler_arguments(arguments)
    model = open_sampler(arguments)
    dataset = open_images(arguments, model)
    count = image_count(dataset, arguments.count, RECONSTRUCTIONS)
    index = torch.arange(count)
    x_0, names = dataset.images(index), image_names(dataset, index)
    images = sampling.reconstruct(model, x_0, seed=arguments.seed, **options).cpu()
    rows = []
    for first in range(0, count, ROW):
        part = slice(first, first + ROW)
        rows += [Strip("input", x_0[part], names[part]), Strip("reconstruction", images[part])]
    write_pictures(output, rows, images=x_0, reconstructions=images)
    print(f"{output}: {count} images and their reconstructions, mean squared error {(images - x_0).square().mean():.4f}")


def run_traverse(arguments: argparse.Namespace) -> None:
    output = output_file(arguments, PICTURES)
    import torch

    from ..evaluation.run import places
    from ..latents import sampling
    from ..metrics.latents import LIVE_RULE, information_per_dim, live_dims
    from ..report.strips import Strip

    options = sampler_arguments(arguments)
    model = open_sampler(arguments)
    axes = open_axes(arguments, model)
    dataset = open_images(arguments, model)
    _known_axes(arguments.axis or [], model, axes)
    (image,) = numbered(arguments, dataset, [arguments.image]).split(1)
    # Those of the report, with its noise, so that both go through the same range.
    known = run_config(arguments) if (Path(arguments.run) / "config.yaml").is_file() else None
    seed, count = (known.seed, known.report.images) if known else (arguments.seed, sampling.RANGE_IMAGES)
    evaluated = places(dataset, count)
    rows = sampling.range_rows(len(evaluated))
    x_0, absent = dataset.read(evaluated[rows])
    there = [place not in absent for place in range(len(x_0))]
    posterior = sampling.encode(model, x_0[there])
    z = posterior.draw(rows[there].to(posterior.mu.device), seed).double().cpu()
    if axes:
        picked, coordinates = arguments.axis or list(range(len(axes.names))), torch.from_numpy(axes.coordinates(z.numpy()))
    else:
        mu, var = posterior.mu.cpu().numpy(), posterior.var.cpu().numpy()
        live = range(model.latent_size) if model.deterministic else live_dims(information_per_dim(mu, var)).tolist()
        picked, coordinates = arguments.axis or list(live), z
    if not picked:
        raise UserError(f"--axis: no latent dimension is live ({LIVE_RULE}) on these images; name those to move")
    x_0 = dataset.images(image)
    values = [sampling.axis_values(coordinates, axis, arguments.values) for axis in picked]
    strips = [
        sampling.traverse(model, x_0, axis, moved, seed=arguments.seed, axes=axes, **options).cpu()
        for axis, moved in zip(picked, values, strict=True)
    ]
    images = torch.stack(strips)  # [axes, values, C, H, W]
    names = [axes.names[axis] if axes else f"z{axis}" for axis in picked]
    drawn = [
        Strip(name, strip, [f"{value:.2f}" for value in moved.tolist()]) for name, strip, moved in zip(names, strips, values, strict=True)
    ]
    write_pictures(output, drawn, images=images, axes=picked, values=torch.stack(values))
    for row, (axis, moved) in enumerate(zip(picked, values, strict=True)):
        print(f"row {row}: axis {axis}{f' ({printable(axes.names[axis])})' if axes else ''}, from {moved[0]:.2f} to {moved[-1]:.2f}")
    what = "z" if model.deterministic else "sampled z"
    same = ", as in the report" if known and not arguments.data else ""
    print(f"range: the middle {sampling.COVERAGE:.0%} of {what} over {len(z)} images{same}")
    print(f"{output}: {len(picked)} row(s) of {arguments.values} values")


def run_interpolate(arguments: argparse.Namespace) -> None:
    output = output_file(arguments, PICTURES)
    import torch

    from ..data.dataset import image_names
    from ..latents import sampling
    from ..report.strips import Strip

    options = sampler_arguments(arguments)
    model = open_sampler(arguments)
    dataset = open_images(arguments, model)
    index = numbered(arguments, dataset, arguments.image)
    a, b = dataset.images(index).split(1)
    images = sampling.interpolate(model, a, b, arguments.count, seed=arguments.seed, **options).cpu()
    first, last = image_names(dataset, index)
    ticks = [first, *(f"{weight:.2f}" for weight in torch.linspace(0, 1, arguments.count).tolist()), last]
    write_pictures(output, [Strip("", torch.cat((a, images, b)), ticks)], images=images, ends=torch.cat((a, b)))
    print(f"{output}: image {arguments.image[0]}, {arguments.count} pictures on the way, image {arguments.image[1]}")


def run_edit(arguments: argparse.Namespace) -> None:
    output = output_file(arguments, PICTURES)
    import torch

    from ..data.dataset import image_names
    from ..latents import sampling
    from ..report.strips import Strip

    options = sampler_arguments(arguments)
    model = open_sampler(arguments)
    axes = open_axes(arguments, model)
    dataset = open_images(arguments, model)
    _known_axes([arguments.axis], model, axes)
    index, amounts = numbered(arguments, dataset, arguments.image), arguments.amount
    x_0 = dataset.images(index)
    images = sampling.edit(model, x_0, arguments.axis, amounts, seed=arguments.seed, axes=axes, **options).cpu()  # [N, V, C, H, W]
    called = axes.names[arguments.axis] if axes else f"z{arguments.axis}"
    ticks = ["image", *(f"{amount:+g}" for amount in amounts)]
    rows = [
        Strip(f"{name}\n{called}", shown, ticks)
        for name, shown in zip(image_names(dataset, index), torch.cat((x_0[:, None], images), 1), strict=True)
    ]
    write_pictures(output, rows, images=x_0, edits=images, axis=arguments.axis, amounts=amounts)
    name = f" ({printable(called)})" if axes else ""
    moves = ", ".join(f"{amount:+g}" for amount in amounts)
    print(f"{output}: {len(x_0)} image(s), each followed by its edits along axis {arguments.axis}{name}: {moves}")


def add_commands(command: AddCommand) -> None:
    drawing = model_options(), data_options(), sampler_options()
    sample = command("sample", run_sample, "draw new images", "sample runs/disks --count 64 --output samples.png", *drawing)
    sample.add_argument("--count", type=at_least(1), default=16, metavar="N", help="images (%(default)s)")
    sample.add_argument(
        "--source",
        choices=("prior", "posterior", "none"),
        default="prior",
        help="latents from N(0, I), from q(z|x) of images, or none: the denoiser alone (%(default)s)",
    )

    reconstruct = command(
        "reconstruct",
        run_reconstruct,
        "encode images and draw them again from their latents, and from fresh noise or their own",
        "reconstruct runs/disks --count 24 --output reconstructions.png",
        *drawing,
        start_options("random"),
    )
    reconstruct.add_argument("--count", type=at_least(1), metavar="N", help=f"the first N images ({RECONSTRUCTIONS})")

    traverse = command(
        "traverse",
        run_traverse,
        "move one latent dimension, or one of --axes, over its range on images (sampled z), all else and the noise held fixed; a row each",
        "traverse runs/disks --axis 2 5 --output traversals.png",
        *drawing,
        start_options("random"),
        axes_options(),
    )
    traverse.add_argument(
        "--axis", type=at_least(0), nargs="+", metavar="D", help="what to move; every live dimension, or all --axes, when left out"
    )
    traverse.add_argument("--values", type=at_least(2), default=9, metavar="N", help="images in a row (%(default)s)")
    traverse.add_argument("--image", type=at_least(0), default=0, metavar="I", help="the image to start from (%(default)s)")

    interpolate = command(
        "interpolate",
        run_interpolate,
        "draw pictures on the way from one image to another: latents on a straight line, starting noise on a great circle",
        "interpolate runs/disks --image 3 8 --output between.png",
        *drawing,
        start_options("inverted"),
    )
    interpolate.add_argument("--image", type=at_least(0), nargs=2, required=True, metavar=("A", "B"), help="the two images")
    interpolate.add_argument(
        "--count", type=at_least(2), default=9, metavar="N", help="pictures, both reconstructed ends included (%(default)s)"
    )

    edit = command(
        "edit",
        run_edit,
        "change images along one latent dimension, or one of --axes, and keep the rest of them; a row per image",
        "edit runs/disks --axis 2 --amount -1 1 --image 0 5 --output edits.png",
        *drawing,
        start_options("inverted"),
        axes_options(),
    )
    edit.add_argument("--axis", type=at_least(0), required=True, metavar="D", help="what to change")
    edit.add_argument("--amount", type=number, nargs="+", required=True, metavar="A", help="by how much; a picture for each")
    edit.add_argument("--image", type=at_least(0), nargs="+", default=[0], metavar="I", help="images to change (%(default)s)")
