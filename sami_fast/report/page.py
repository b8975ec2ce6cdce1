"""What the report's page says."""

import json
import math
import shlex
from collections.abc import Sequence
from typing import Any

from ..config import to_yaml
from ..evaluation import Run
from .figures import ReportFigure
from .markup import contents, details, document, footer, header, image, paragraph, preformatted, section
from .tables import Scores, axis_tables, bound_section, score_section

FOUND = 0.9  # rank correlation from which a factor counts as found on a latent of its own

NAMES = {"sami": "SAMI", "beta_vae": "β-VAE", "diffae": "Diffusion autoencoder"}
METHODS = {
    "sami": "SAMI is an autoencoder without a decoder. An encoder turns an image into a few numbers, the latents. To get an image back, an "
    "ordinary diffusion model removes noise step by step while the encoder steers it, towards images that the encoder would give the "
    "wanted latents. Both networks learn together, without labels, and every latent has to be worth the information it costs.",
    "beta_vae": "A β-VAE is an autoencoder, trained here as a baseline that SAMI is compared with. An encoder turns an image into a few "
    "noisy numbers, the latents, and a decoder turns these back into the image. The information in the latents is charged for at a price "
    "β, so that each has to be worth what it costs. Both networks learn together, without labels.",
    "diffae": "A diffusion autoencoder is trained here as a baseline that SAMI is compared with. An encoder turns an image into a few "
    "numbers, the latents, and a diffusion model that is told these removes noise step by step until there is an image again. Both "
    "networks learn together, without labels. {price}",
}
PRICES = {
    True: "The latents are noisy, and the information in them is charged for.",
    False: "The latents are free of noise and nothing is charged for what they hold, so this page cannot say how much each of them tells.",
}
COLLAPSED = {
    "sami": "The posterior has collapsed: none of the {latents} latents carries information ({kl:.3f} nats in all). The diffusion model "
    "works without them, so there is nothing to traverse, and the reconstructions below are mere samples. A lower kl_weight.start, a "
    "longer train.denoiser_warmup or objective.free_bits above 0 usually helps.",
    "other": "The posterior has collapsed: none of the {latents} latents carries information ({kl:.3f} nats in all), so there is nothing "
    "to traverse, and all reconstructions below are the same but for chance. A lower kl_weight usually helps.",
}


def command_line(environment: dict[str, Any]) -> str:
    """The command that made the run, as one would type it."""
    words = [word for word in map(str, environment.get("command") or []) if not word.startswith("--local_rank")]
    return shlex.join(["python", *words] if words and words[0].endswith(".py") else words)


def next_commands(run: Run, scores: Scores) -> str:
    """Commands that make this page again, and go on from it."""
    folder, live = shlex.quote(str(run.folder)), scores["active_dims"] > 0
    steps = [
        ("this page again", f"sami-fast report {folder}"),
        ("the scores, beside those of the untrained encoder, PCA and pixels", f"sami-fast evaluate {folder}"),
    ]
    if "axes" in scores:
        steps += [
            ("axes found without labels, with more images than here", f"sami-fast axes {folder} --output axes.npz"),
            ("pictures along these axes", f"sami-fast traverse {folder} --axes axes.npz --output axes_traversals.png"),
        ]
    if live:
        steps.append(("pictures along each live latent", f"sami-fast traverse {folder} --output traversals.png"))
    steps.append(("the latents of the evaluation images, as arrays", f"sami-fast encode {folder} --output latents.npz"))
    return "\n\n".join(f"# {words}\n{command}" for words, command in steps)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _source(run: Run) -> str:
    channels, side, _ = run.evaluation.image_shape
    kind, path = run.config.data.kind, run.config.data.path
    drawn = {"disks": "generated images of one disk", "sprites": "generated images of one sprite"}
    stored = "the frames of the videos in" if kind == "video_folder" else "the images in"
    what = drawn.get(kind) or f"{stored} {path}"
    return f"{what}, {side} by {side} pixels, {channels} channel{'s' if channels > 1 else ''}"


def _summary(run: Run, scores: Scores, names: Sequence[str]) -> str:
    """What was done and what came out, in plain sentences."""
    latents, live, kl, method = run.model.latent_size, scores["active_dims"], scores["kl_nats"], run.config.method
    held_out = run.evaluation.held_out
    text = paragraph(METHODS[method].format(price=PRICES[kl is not None])) + paragraph(
        f"This run trained on {_source(run)}, for {scores['steps']} steps: {_duration(scores['wall_seconds'])}, "
        f"{scores['images_per_second']:.0f} images per second. The scores are measured on {scores['num_images']} images "
        + ("that training did not use." if held_out else "that training used too: none are held out.")
    )
    if not live and kl is not None:
        return text + paragraph(COLLAPSED["sami" if method == "sami" else "other"].format(latents=latents, kl=kl), "alarm")
    if kl is None:
        outcome = f"{live} of {latents} latents vary from image to image."
    else:
        outcome = f"{live} of {latents} latents carry information, {kl:.1f} nats ({kl / math.log(2):.1f} bits) per image together"
        outcome += "." if live == latents else "; the others stayed at the prior."
    if "mcc_per_factor" in scores:
        found = [name for name in names if scores["mcc_per_factor"][name] >= FOUND]
        missed = [name for name in names if name not in found]
        outcome += f" The images were made from {len(names)} factors."
        outcome += f" Found, each on a latent of its own: {', '.join(found)}." if found else ""
        outcome += f" Not found on a latent of their own: {', '.join(missed)}." if missed else ""
        outcome += f" (Found means a rank correlation of at least {FOUND}.)"
    return text + paragraph(outcome)


def render(run: Run, scores: Scores, names: Sequence[str], figures: Sequence[ReportFigure]) -> str:
    """The whole page, one HTML file that needs nothing else.

    Args:
        run: The run.
        scores: What stands in metrics.json.
        names: Of the factors that vary.
        figures: In the order of the page.
    """
    config, environment = run.config, run.environment
    version = f"sami-fast {environment.get('sami_fast', 'of unknown version')}"
    version += f" at {environment['commit'][:10]}" if environment.get("commit") else ""
    facts = f"{scores['steps']} steps of {config.train.batch_size} images · seed {config.seed} · {version}"
    title = f"{NAMES[config.method]} run “{config.name}”"
    below = {"axes": axis_tables(scores["axes"], names)} if "axes" in scores else {}
    bound = "elbo_nats" in scores
    titles = ["Scores", *(figure.title for figure in figures), *(["The bound"] if bound else []), "How it was made"]
    sections = [
        score_section(scores, names),
        *(section(figure.title, image(figure.png, figure.alt, figure.caption), below.get(figure.name, "")) for figure in figures),
        bound_section(scores) if bound else "",
        section(
            "How it was made",
            paragraph("Training:"),
            preformatted(command_line(environment)),
            paragraph("From the run, in the folder where training was started:"),
            preformatted(next_commands(run, scores)),
            details("Configuration", to_yaml(config)),
            details("Environment", json.dumps(environment, indent=2)),
        ),
    ]
    return document(
        title,
        header(title, facts),
        _summary(run, scores, names),
        contents(titles),
        *sections,
        footer("The numbers are in metrics.json beside this page, the pictures in the .png files. SAMI: arXiv:2512.17127."),
    )
