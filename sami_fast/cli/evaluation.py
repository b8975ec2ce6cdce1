"""Commands that say what the latents of trained runs mean: evaluate, axes, report."""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from ..environment import cores
from ..errors import UserError, printable
from ..latents import DISCOVERY_METHODS
from .files import chosen_device, output_file, write_bytes
from .options import AddCommand, at_least, axes_options, device_options, number, path, trust_option

if TYPE_CHECKING:
    import numpy as np

    from ..evaluation import Run
    from ..latents.discovery import Discovered

DISCOVERY_IMAGES = 256
MOST_BESIDE = 4  # runs on one page


def run_evaluate(arguments: argparse.Namespace) -> None:
    output = output_file(arguments, (".md", ".json")) if arguments.output else None
    if len({Path(folder).resolve() for folder in arguments.run}) < len(arguments.run):
        raise UserError(f"expected each run once, found {max(arguments.run, key=arguments.run.count)} more than once")
    from ..config import settings_of
    from ..evaluation import evaluate_run, num_stages, open_run, tables
    from ..progress import bar

    device = chosen_device(arguments)
    runs = [
        open_run(Path(folder), arguments.images, trust_remote_code=arguments.trust, device=device) for folder in arguments.run
    ]  # what is wrong with any is found before work is done
    # Runs on the same images, whose encoders began with the same weights, share what does not depend on training.
    shares = [(run.config.data, run.config.encoder, run.config.seed) for run in runs]
    first = [arguments.baselines and share not in shares[:place] for place, share in enumerate(shares)]
    evaluated = []
    with bar(sum(map(num_stages, first)), "evaluating", "stages") as progress:
        for run, baselines in zip(runs, first, strict=True):

            def say(stage: str, run: "Run" = run) -> None:
                progress.set_description(f"{printable(run.folder.name)}, {stage}")
                progress.update()

            evaluated.append(evaluate_run(run, jobs=arguments.jobs, baselines=baselines, say=say))
    text = tables(evaluated)
    print("\n".join(map(printable, text.splitlines())))
    if output:
        rows = [
            {
                "run": run.folder,
                "config": settings_of(run.config),
                **run.scores,
                "baselines": run.baselines,
                "straightness": run.straightness,
            }
            for run in evaluated
        ]
        write_bytes(output, (json.dumps(rows, indent=2) if output.suffix == ".json" else text + "\n").encode())


def run_axes(arguments: argparse.Namespace) -> None:
    output = output_file(arguments, (".npz",))
    if arguments.logsnr is not None and arguments.method != "level":
        raise UserError(f"--logsnr: only --method level looks at one noise level, and --method is {arguments.method}")
    picture = output.with_suffix(".png")
    if picture.exists() and not arguments.overwrite:
        raise UserError(f"--output: {picture}, where the pictures go, exists; choose another name or add --overwrite")
    from ..evaluation import encode, known_factors, open_run
    from ..evaluation.factors import factor_correlations
    from ..latents.discovery import discover
    from ..report.strips import axis_strips, png, strips

    run = open_run(Path(arguments.run), trust_remote_code=arguments.trust, device=chosen_device(arguments))
    if not run.model.guides:
        raise UserError(f"{arguments.run}: expected a SAMI run, whose denoiser can be asked, found one of method {run.model.method}")
    count = min(arguments.images, run.count)
    options = {"encoded": run.count, "draws": arguments.draws, "seed": arguments.seed, "batch_size": run.batch_size}
    try:
        found = discover(run.model, run.images, count, **options)
    except ValueError as error:
        raise UserError(f"{arguments.run}: {error}") from None
    latents, (factors, names, periods) = encode(run, run.model), known_factors(run)
    print("undecided at logsnr", " ".join(f"{level:.1f}" for level in found[0].logsnr))
    for axes in found:
        codes = axes.axes.coordinates(latents.mu)
        print("\n".join(_lines(axes, names, factor_correlations(codes, factors, names, periods) if names else None)))
    chosen = _chosen(found, arguments.method, arguments.logsnr)
    chosen.axes.save(output)
    write_bytes(picture, png(strips(axis_strips(run, chosen, latents))))
    print(f"{output}, {picture}: {len(chosen.names)} axes by {chosen.method}, for --axes of encode, traverse and edit")


def _chosen(found: "list[Discovered]", method: str, logsnr: float | None) -> "Discovered":
    """The axes of one method; of one level, those of the level nearest to `logsnr`."""
    same = [axes for axes in found if axes.method == method]
    middle = same[len(same) // 2].logsnr[0] if logsnr is None else logsnr
    return min(same, key=lambda axes: abs(axes.logsnr[0] - middle)) if method == "level" else same[0]


def _lines(axes: "Discovered", names: tuple[str, ...], correlation: "np.ndarray | None") -> list[str]:
    """A line per axis: its score, what is undecided along it at each level and, where factors are known, the one it follows.

    Args:
        correlation: Of factors and axes. [F, A].
    """
    lines = [f"{axes.method}: the score is the {axes.score_name}"]
    for place, name in enumerate(axes.names):
        score = f"{axes.score[place]:8.3f}" if math.isfinite(axes.score[place]) else "outside "
        line = f"  {name:<14} {score}   " + " ".join(f"{share:.2f}" for share in axes.profile[:, place])
        if correlation is not None:
            best = correlation[:, place].argmax()
            line += f"   {printable(names[best])} {correlation[best, place]:.2f}"
        lines.append(line)
    return lines


def run_report(arguments: argparse.Namespace) -> None:
    folders = [Path(folder) for folder in arguments.run]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"expected each run once, found {max(arguments.run, key=arguments.run.count)} more than once")
    if len(folders) > MOST_BESIDE:
        raise UserError(f"expected at most {MOST_BESIDE} runs side by side, found {len(folders)}")
    if bool(arguments.output) != (len(folders) > 1):
        raise UserError("--output: expected for several runs side by side, and for them alone; the report of one lies in its folder")
    if arguments.output and arguments.axes:
        raise UserError("--axes: expected with a single run; of several each has an axes.npz of its own, or none")
    output = output_file(arguments, (".html",)) if arguments.output else None
    from ..report import write_comparison, write_report

    device = chosen_device(arguments)
    if output:
        print(write_comparison(folders, output, trust_remote_code=arguments.trust, device=device, jobs=arguments.threads))
        return
    page = write_report(folders[0], trust_remote_code=arguments.trust, axes=arguments.axes, device=device, jobs=arguments.threads)
    from ..engine.monitors import show_report

    show_report(folders[0])
    print(page)


def add_commands(command: AddCommand) -> None:
    evaluate = command(
        "evaluate",
        run_evaluate,
        "score runs side by side: factors recovered, rates, bound, noise levels, straightness of clips; seeds of one method are averaged",
        "evaluate runs/disks_seed0 runs/disks_seed1 --output table.md",
        trust_option(),
        device_options(),
    )
    evaluate.add_argument("run", type=path, nargs="+", help="run folders")
    evaluate.add_argument("--images", type=at_least(16), metavar="N", help="evaluation images; as each run's report when left out")
    evaluate.add_argument("--output", type=path, metavar="FILE", help="also write the tables (.md) or every number (.json)")
    evaluate.add_argument("--overwrite", action="store_true", help="replace the output file")
    evaluate.add_argument(
        "--jobs",
        type=at_least(1, 1024),
        default=cores(),
        metavar="N",
        help="processes for the metrics that grow trees (%(default)s)",
    )
    evaluate.add_argument("--no-baselines", dest="baselines", action="store_false", help="leave out the untrained encoder, PCA and pixels")

    axes = command(
        "axes",
        run_axes,
        "find axes of the latent space without labels, coarse to fine, and write them with a strip of pictures each",
        "axes runs/disks --output axes.npz",
        trust_option(),
        device_options(),
    )
    axes.add_argument("run", type=path, help="a run folder of SAMI")
    axes.add_argument("--output", type=path, required=True, metavar="FILE", help=".npz for --axes of other commands; pictures go beside it")
    axes.add_argument("--overwrite", action="store_true", help="replace the files")
    axes.add_argument(
        "--method",
        choices=DISCOVERY_METHODS,
        default="scale",
        help="which axes to write: scale looks at all noise levels together, level at one (%(default)s); all are printed",
    )
    axes.add_argument(
        "--logsnr", type=number, metavar="L", help="noise level for level, ln(alpha^2 / sigma^2); the middle one when left out"
    )
    axes.add_argument("--images", type=at_least(16), default=DISCOVERY_IMAGES, metavar="N", help="images to draw from (%(default)s)")
    axes.add_argument(
        "--draws", type=at_least(2, 1000), default=3, metavar="N", help="draws of p(x_0|x_t) per image and level (%(default)s)"
    )
    axes.add_argument("--seed", type=at_least(0, 2**63 - 1), default=0, help="of all noise (%(default)s)")

    report = command(
        "report",
        run_report,
        "score a finished run and write its report/ folder, or show several runs side by side on one page",
        "report runs/disks",
        trust_option(),
        device_options(),
        axes_options("whose names the latents get, where one runs along a latent; axes.npz of the run, if there is one, when left out"),
    )
    report.add_argument("run", type=path, nargs="+", help="a run folder, or several to compare")
    report.add_argument("--output", type=path, metavar="FILE", help="the page of several runs (.html)")
    report.add_argument("--overwrite", action="store_true", help="replace that page")
