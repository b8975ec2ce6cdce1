"""Commands that draw images: sample, reconstruct, traverse, interpolate, edit."""

import argparse
import math
from typing import TYPE_CHECKING

from ..errors import UserError, printable
from .files import image_count, numbered, open_axes, open_images, open_sampler, output_file, write_pictures
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
REFERENCE_IMAGES = 1000  # of the aggregated posterior behind a traversal: enough for its live axes and their ranges
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
    write_pictures(output, images, math.ceil(math.sqrt(count)), **arrays)
    print(f"{output}: {count} image(s)")


def run_reconstruct(arguments: argparse.Namespace) -> None:
    output = output_file(arguments, PICTURES)
    import torch
    from einops import rearrange
    from torch.nn.functional import pad

    from ..latents import sampling

    options = sampler_arguments(arguments)
    model = open_sampler(arguments)
    dataset = open_images(arguments, model)
    count = image_count(dataset, arguments.count, RECONSTRUCTIONS)
    x_0 = dataset.images(torch.arange(count))
    images = sampling.reconstruct(model, x_0, seed=arguments.seed, **options).cpu()
    # Each row of inputs stands above the row of their reconstructions; the last pair of rows is filled up with white.
    columns = min(count, ROW)
    padded = pad(torch.stack((x_0, images)), (0, 0, 0, 0, 0, 0, 0, -count % columns), value=1.0)
    grid = rearrange(padded, "pair (rows columns) c h w -> (rows pair columns) c h w", columns=columns)
    write_pictures(output, grid, columns, images=x_0, reconstructions=images)
    print(f"{output}: {count} images and their reconstructions, mean squared error {(images - x_0).square().mean():.4f}")


def run_traverse(arguments: argparse.Namespace) -> None:
    output = output_file(arguments, PICTURES)
    import torch

    from ..latents import sampling
    from ..metrics.latents import LIVE_RULE, information_per_dim, live_dims

    options = sampler_arguments(arguments)
    model = open_sampler(arguments)
    axes = open_axes(arguments, model)
    dataset = open_images(arguments, model)
    _known_axes(arguments.axis or [], model, axes)
    (image,) = numbered(arguments, dataset, [arguments.image]).split(1)
    reference = torch.arange(image_count(dataset, None, REFERENCE_IMAGES))
    x_0, absent = dataset.read(reference)
    posterior = sampling.encode(model, x_0[[place not in absent for place in range(len(x_0))]])
    mu, var = posterior.mu.cpu(), posterior.var.cpu()
    if axes:
        picked, coordinates = arguments.axis or list(range(len(axes.names))), torch.from_numpy(axes.coordinates(mu.numpy()))
    else:
        live = range(model.latent_size) if model.deterministic else live_dims(information_per_dim(mu.numpy(), var.numpy())).tolist()
        picked, coordinates = arguments.axis or list(live), mu
    if not picked:
        raise UserError(f"--axis: no latent dimension is live ({LIVE_RULE}) on these images; name those to move")
    x_0 = dataset.images(image)
    values = [sampling.axis_values(coordinates, axis, arguments.values) for axis in picked]
    strips = [
        sampling.traverse(model, x_0, axis, moved, seed=arguments.seed, axes=axes, **options).cpu()
        for axis, moved in zip(picked, values, strict=True)
    ]
    images = torch.stack(strips)  # [axes, values, C, H, W]
    write_pictures(output, images.flatten(0, 1), arguments.values, images=images, axes=picked, values=torch.stack(values))
    for row, (axis, moved) in enumerate(zip(picked, values, strict=True)):
        print(f"row {row}: axis {axis}{f' ({printable(axes.names[axis])})' if axes else ''}, from {moved[0]:.2f} to {moved[-1]:.2f}")
    print(f"{output}: {len(picked)} row(s) of {arguments.values} values")


def run_interpolate(arguments: argparse.Namespace) -> None:
    output = output_file(arguments, PICTURES)
    import torch

    from ..latents import sampling

    options = sampler_arguments(arguments)
    model = open_sampler(arguments)
    dataset = open_images(arguments, model)
    a, b = dataset.images(numbered(arguments, dataset, arguments.image)).split(1)
    images = sampling.interpolate(model, a, b, arguments.count, seed=arguments.seed, **options).cpu()
    shown = torch.cat((a, images, b))
    write_pictures(output, shown, len(shown), images=images, ends=torch.cat((a, b)))
    print(f"{output}: image {arguments.image[0]}, {arguments.count} pictures on the way, image {arguments.image[1]}")


def run_edit(arguments: argparse.Namespace) -> None:
    output = output_file(arguments, PICTURES)
    import torch

    from ..latents import sampling

    options = sampler_arguments(arguments)
    model = open_sampler(arguments)
    axes = open_axes(arguments, model)
    dataset = open_images(arguments, model)
    _known_axes([arguments.axis], model, axes)
    x_0, amounts = dataset.images(numbered(arguments, dataset, arguments.image)), arguments.amount
    images = sampling.edit(model, x_0, arguments.axis, amounts, seed=arguments.seed, axes=axes, **options).cpu()  # [N, V, C, H, W]
    shown = torch.cat((x_0[:, None], images), 1)
    write_pictures(output, shown.flatten(0, 1), shown.shape[1], images=x_0, edits=images, axis=arguments.axis, amounts=amounts)
    name = f" ({printable(axes.names[arguments.axis])})" if axes else ""
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
        "move one latent dimension, or one of --axes, over the range it has on images, all else and the noise held fixed; a row each",
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
