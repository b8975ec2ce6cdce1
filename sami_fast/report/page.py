"""What the report's page says."""

import json
import math
import shlex
from collections.abc import Sequence
from typing import Any

from ..config import to_yaml
from ..metrics.latents import LIVE_NATS
from .figures import ReportFigure
from .markup import details, document, footer, header, image, paragraph, preformatted, section, table
from .run import Run

FOUND = 0.9  # rank correlation from which a factor counts as found on a latent of its own

METHOD = (
    "SAMI is an autoencoder without a decoder. An encoder turns an image into a few numbers, the latents. To get an image back, an "
    "ordinary diffusion model removes noise step by step while the encoder steers it, towards images that the encoder would give the "
    "wanted latents. Both networks learn together, without labels, and every latent has to be worth the information it costs."
)
COLLAPSED = (
    "The posterior has collapsed: none of the {latents} latents carries information ({kl:.3f} nats in all). The diffusion model works "
    "without them, so there is nothing to traverse, and the reconstructions below are mere samples. A lower kl_weight.start, a longer "
    "train.denoiser_warmup or objective.free_bits above 0 usually helps."
)
SCALE_TRAP = (
    "A trap to know about: these scores are blind to scale. From the mean response of the untrained encoder a linear map reaches R² "
    "{values}, a signal so faint that the latents' own noise drowns it. Every score in the tables is therefore computed from noisy "
    "samples of z, which hold no more than z really carries."
)
DENSITY = (
    "The pixels are continuous, so this bounds a density, in units of pixel values from -1 to 1. It may be negative, and for noiseless "
    "pictures it keeps falling as schedule.logsnr_max rises: compare it only between runs with the same range."
)
PROBABILITY = "The pixels have 256 levels, so this bounds a probability: bits per dimension compare with those of other models."


def command_line(environment: dict[str, Any]) -> str:
    """The command that made the run, as one would type it."""
    words = [word for word in map(str, environment.get("command") or []) if not word.startswith("--local_rank")]
    return shlex.join(["python", *words] if words and words[0].endswith(".py") else words)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _source(run: Run) -> str:
    channels, side, _ = run.evaluation.image_shape
    if run.config.data.kind == "disks":
        return f"generated images of one disk, {side} by {side} pixels"
    return f"the images in {run.config.data.path}, {side} by {side} pixels, {channels} channel{'s' if channels > 1 else ''}"


def _summary(run: Run, scores: dict[str, Any]) -> str:
    """What was done and what came out, in plain sentences."""
    names, latents, live, kl = run.evaluation.factor_names, len(scores["kl_per_dim"]), scores["active_dims"], scores["kl_nats"]
    held_out = getattr(run.evaluation, "held_out", True)
    text = paragraph(METHOD) + paragraph(
        f"This run trained on {_source(run)}, for {scores['steps']} steps: {_duration(scores['wall_seconds'])}, "
        f"{scores['images_per_second']:.0f} images per second. The scores are measured on {scores['num_images']} images "
        + ("that training did not use." if held_out else "that training used too: none are held out.")
    )
    if not live:
        return text + paragraph(COLLAPSED.format(latents=latents, kl=kl), "alarm")
    outcome = f"{live} of {latents} latents carry information, {kl:.1f} nats ({kl / math.log(2):.1f} bits) per image together"
    outcome += "." if live == latents else "; the others stayed at the prior."
    if names:
        found = [name for name in names if scores["mcc_per_factor"][name] >= FOUND]
        missed = [name for name in names if name not in found]
        outcome += f" The images were made from {len(names)} factors."
        outcome += f" Found, each on a latent of its own: {', '.join(found)}." if found else ""
        outcome += f" Not found on a latent of their own: {', '.join(missed)}." if missed else ""
        outcome += f" (Found means a rank correlation of at least {FOUND}.)"
    return text + paragraph(outcome)


def _scores(scores: dict[str, Any], names: Sequence[str]) -> str:
    """Trained beside untrained: the means, then each factor."""
    before = scores["untrained"]

    def beside(value: Any, unit: str = "", digits: int = 3) -> tuple[str, str]:
        return tuple(f"{value(s):.{digits}f}{unit}" for s in (scores, before))

    rows = [
        ("Information in z (KL)", *beside(lambda s: s["kl_nats"], " nats", 2), "What the latents cost, and at most tell, per image."),
        ("Live latents", *beside(lambda s: s["active_dims"], "", 0), f"Those that cost more than {LIVE_NATS:g} nats."),
    ]
    if names:
        rows += [
            (
                "Linear R²",
                *beside(lambda s: sum(s["linear_r2"].values()) / len(names)),
                "Share of the factors' variance that a linear map reads from z.",
            ),
            ("MCC", *beside(lambda s: s["mcc"]), "Rank correlation of each factor with one latent of its own; 1 is perfect."),
            (
                "MIG",
                *beside(lambda s: s["mig"]),
                f"Lead of the best latent over the second best; a perfect code reaches {scores['mig_ceiling']:.2f} here.",
            ),
        ]
    means = table(
        "The trained encoder beside the same encoder before its first step.",
        ("Score", "Trained", "Untrained", "What it says"),
        rows,
        (1, 2),
    )
    if not names:
        return section("Scores", means)
    keys = ("linear_r2", "mcc_per_factor", "mig_per_factor")
    per_factor = table(
        "The same by factor.",
        ("Factor", "Linear R²", "untrained", "MCC", "untrained", "MIG", "untrained"),
        [(name, *(v for key in keys for v in beside(lambda s, key=key, name=name: s[key][name]))) for name in names],
        range(1, 7),
    )
    values = ", ".join(f"{name} {before['linear_r2_mu'][name]:.2f}" for name in names)
    return section("Scores", means, per_factor, paragraph(SCALE_TRAP.format(values=values)))


def _bound(scores: dict[str, Any]) -> str:
    """The parts of the negative ELBO."""
    unguided, error, bits = (scores[key] for key in ("unguided_nats", "elbo_standard_error_nats", "bits_per_dim"))
    spread = f", with a standard error of {error:.2f}" if error is not None else ""
    rows = [
        ("Denoising, guided by z", "diffusion_nats", f"{unguided:.2f} for the same denoiser without guidance."),
        ("KL of z", "kl_nats", "The price of the latents."),
        ("Prior", "prior_nats", "What the noisiest level still shows of the image."),
        (
            "Reconstruction",
            "reconstruction_nats",
            f"From the cleanest level: a Gaussian of standard deviation {scores['decoder_std']:.4f} around the model's guess.",
        ),
        ("Negative ELBO", "elbo_nats", f"The sum{spread}; {bits:.3f} bits per dimension."),
    ]
    return section(
        "The bound",
        paragraph("The objective is one bound on an image's negative log likelihood. Its parts:"),
        table(
            "Mean over the images, nats.",
            ("Term", "Nats", "What it is"),
            [(name, f"{scores[key]:.2f}", words) for name, key, words in rows],
            (1,),
        ),
        paragraph(DENSITY if scores["elbo_of"] == "density" else PROBABILITY),
    )


def render(run: Run, scores: dict[str, Any], figures: Sequence[ReportFigure]) -> str:
    """The whole page, one HTML file that needs nothing else.

    Args:
        run: The run.
        scores: What `compute_scores` returned.
        figures: In the order of the page.
    """
    config, environment = run.config, run.environment
    version = f"sami-fast {environment.get('sami_fast', 'of unknown version')}"
    version += f" at {environment['commit'][:10]}" if environment.get("commit") else ""
    facts = f"{scores['steps']} steps of {config.train.batch_size} images · seed {config.seed} · {version}"
    title = f"SAMI run “{config.name}”"
    return document(
        title,
        header(title, facts),
        _summary(run, scores),
        _scores(scores, run.evaluation.factor_names),
        *(section(figure.title, image(figure.png, figure.alt, figure.caption)) for figure in figures),
        _bound(scores),
        section(
            "How it was made",
            preformatted(command_line(environment)),
            details("Configuration", to_yaml(config)),
            details("Environment", json.dumps(environment, indent=2)),
        ),
        footer("The numbers are in metrics.json beside this page, the pictures in the .png files. Method: arXiv:2512.17127."),
    )
