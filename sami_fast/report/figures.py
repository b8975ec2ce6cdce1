"""The figures of a report, each with its words."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure

from ..evaluation import Latents, Run
from ..latents.discovery import Discovered
from ..metrics.latents import LIVE_NATS
from ..metrics.scale_profile import ScaleProfile
from .charts import MATRIX_ROWS, MAX_AXES, RHO, correlations, latents_against_factors, scatter_fits, training_curves
from .levels import calibration, information
from .motion import Clips, curvatures, trajectories
from .strips import COVERAGE, axis_strips, central_image, png, reconstructions, samples, traversals

TRAVERSALS = (
    "One row per live latent{order}. Along a row that latent moves through the range it takes on real images "
    f"(the middle {COVERAGE:.0%} of them; its value is below each image), while the other latents{{noise}} stay as they are."
)
TRAVERSALS_WITH_FACTORS = f" Each row names the factor its latent follows best, with their rank correlation {RHO}."
MORE_AXES = f" Only the first {MAX_AXES} are shown."
RECONSTRUCTIONS = {
    "sami": "Above, images that the scores are measured on; below, what {steps} guided denoising steps make of fresh noise when all they "
    "know of the image is its latents.",
    "diffae": "Above, images that the scores are measured on; below, what {steps} denoising steps make of fresh noise when the denoiser "
    "is told the image's latents and no more.",
    "beta_vae": "Above, images that the scores are measured on; below, what the decoder makes of their latents.",
}
SAMPLES = {
    "sami": "Above, images of the data. Middle, new images: latents drawn from the prior, the distribution that training pulls them "
    "towards, then guided denoising of noise. Below, what the denoiser draws without latents.",
    "diffae": "Above, images of the data. Below, new images: latents drawn at random{source}, then denoising of noise.",
    "beta_vae": "Above, images of the data. Below, new images: latents drawn from the prior, the distribution that training pulls them "
    "towards, then the decoder.",
}
PRIOR = " from the prior, the distribution that training pulls them towards"
FITTED = ", normally distributed with the mean and the covariance that the latents of the data have, as this method has no prior"
CORRELATIONS = (
    f"A row per live latent{{order}}, a column per factor: how strongly the latent follows the factor. |{RHO}| is the rank correlation "
    "without its sign, between {sample} and the factor: 1 where one always rises, or always falls, with the other, "
    "0 where they have nothing to do with each other. In a disentangled code every column has one dark cell, each in a row of its own. "
    "A factor that a latent follows up and then down again is missed."
)
MORE_ROWS = f" Only the first {MATRIX_ROWS} latents are shown."
LATENTS = (
    "The same in full: each dot is one image. A latent that recovers a factor draws a narrow, monotonic band in one "
    f"column and a featureless cloud in the others. |{RHO}| is the rank correlation."
)
INFORMATION = (
    "Noise is added to images, and the encoder reads them again. A curve tells how much the noisy image still says about a latent, in nats "
    "(1 nat is 1.44 bits); at the right end it nears the latent's whole information. Latents that rise early, on the left, hold what can "
    "be seen through much noise: large, coarse features; those that rise late hold fine detail. The dot marks where half is left, the "
    "latent's characteristic scale. Below zero the encoder is confidently wrong. The pictures show one image at those noise levels."
)
CALIBRATION = (
    "The encoder states a mean and a standard deviation for each latent. Read from noisier and noisier copies of an image, the distance "
    "between the latent and that mean, divided by that standard deviation, should have mean 0 and spread 1 at every noise level (dashed). "
    "A spread above 1: the encoder is surer than it has a right to be; below 1: it is too modest.{blind}"
)
BLIND = " Only the clean end was trained here: this method never shows its encoder a noisy image."
AXES = (
    "A latent is one way to turn the space, and not always the most telling. Here axes are found from the model's own probabilities, "
    "without labels: noise is added to images, the denoiser draws several clean images that fit each noisy one, and directions in which "
    "these disagree are still undecided at that noise level. Axes are ordered by the noise level at which a quarter is still open, coarse "
    "at the top, fine at the bottom; it stands beside the name (log of signal to noise, as above) where it lies within the levels looked "
    "at. Axes that are decided at the same level cannot be told apart. Along a row one coordinate moves through the middle "
    f"{COVERAGE:.0%} of the data, in standard deviations, and the other coordinates and the noise stay."
)
TRAJECTORIES = (
    "Each clip is a path through the latents, frame by frame, each frame encoded by itself; dark is its start, yellow its end. All paths "
    "are seen in one plane, the one that shows most of their movement, with the same length on both axes; a flat picture hides what moves "
    "across it, the more the smaller the shares of variance. Grey: single images of the data. A model that represents motion well draws "
    "smooth, straight paths."
)
CURVATURES = (
    "A dot per clip: the mean angle by which its path turns from one frame to the next, along the latents and along the raw pixels. Below "
    "the dashed line the latents run straighter than the pixels. Over {clips} clips of {frames} frames the latents turn by {latents:.1f}° "
    "a frame on average, the pixels by {pixels:.1f}°. Noise in the frames bends any path, and stretching single latents changes the angle."
)
TRAINING = {
    "sami": "Left, the error of the estimated noise with and without the encoder's guidance: the gap is what the latents are worth; "
    "dashed, what they cost. ",
    "diffae": "{left}he error of the noise that the denoiser estimates when it is told the latents{cost}. ",
    "beta_vae": "Left, the squared error of the decoder's images, in nats; dashed, what the latents cost. ",
}
RATES = (
    f"Middle, the information in each latent, one batch at a time; above {LIVE_NATS:g} nats it counts as live. Right, the price β of a nat."
)


@dataclass(frozen=True)
class ReportFigure:
    """A figure as the page shows it, and as it lies in the report folder."""

    name: str  # of the file, without .png
    title: str
    png: bytes
    alt: str
    caption: str


def make_figures(
    run: Run,
    latents: Latents,
    factors: np.ndarray,
    names: tuple[str, ...],
    measured: ScaleProfile | None,
    found: dict[str, Discovered],
    clips: Clips | None,
) -> list[ReportFigure]:
    """All figures in the order of the page; those that the run has nothing to show in are left out.

    Args:
        run: The run.
        latents: Of its evaluation images.
        factors: [N, F] of the same images, F may be 0.
        names: Of the factors.
        measured: Over noise levels; None of a deterministic encoder.
        found: Axes by method, empty where there are none.
        clips: None where the data have none.
    """
    figures: list[ReportFigure] = []
    live, method, rated = latents.live, run.config.method, latents.kl is not None
    order, sample = (", the most informative first", "one noisy sample of z per image") if rated else ("", "z")
    noise = "" if run.model.decodes else " and the noise"
    more = MORE_AXES if len(live) > MAX_AXES else ""

    def add(name: str, title: str, figure: Figure, alt: str, caption: str) -> None:
        figures.append(ReportFigure(name, title, png(figure), alt, caption))

    if len(live):
        add(
            "traversals",
            "What each latent does",
            traversals(run, latents, factors, names),
            "Rows of generated images, one row per live latent; along a row that latent grows and everything else stays fixed.",
            TRAVERSALS.format(order=order, noise=noise) + (TRAVERSALS_WITH_FACTORS if names else "") + more,
        )
    add(
        "reconstructions",
        "Reconstructions",
        reconstructions(run),
        "Two rows of images: inputs above, their reconstructions below.",
        RECONSTRUCTIONS[method].format(steps=run.config.report.sample_steps),
    )
    add(
        "samples",
        "Samples",
        samples(run, latents),
        "Rows of images: data, generated images" + (", and what the denoiser draws without latents." if method == "sami" else "."),
        SAMPLES[method].format(source=PRIOR if rated else FITTED),
    )
    if len(live) and names:
        add(
            "correlations",
            "Latents and factors",
            correlations(latents, factors, names),
            f"A table of colours: the rank correlation of every live latent with {', '.join(names)}.",
            CORRELATIONS.format(order=order, sample=sample) + (MORE_ROWS if len(live) > MATRIX_ROWS else ""),
        )
        if scatter_fits(latents, names):
            add(
                "latents",
                "Latents against factors",
                latents_against_factors(latents, factors, names),
                f"Scatter plots of the live latents against {', '.join(names)}.",
                LATENTS + more,
            )
    if len(live) and measured is not None:
        x_0 = run.images(torch.tensor([central_image(latents)]))
        add(
            "information",
            "Coarse and fine: the latents under noise",
            information(measured, latents, x_0),
            "A curve per live latent: the information a noisy image still holds about it, from mostly noise to nearly clean.",
            INFORMATION + more,
        )
        add(
            "calibration",
            "Calibration",
            calibration(measured, latents),
            "Two charts over noise levels, a curve per live latent: spread and mean of the encoder's standardised errors.",
            CALIBRATION.format(blind="" if method == "sami" else BLIND),
        )
    if "scale" in found:
        add(
            "axes",
            "Axes found without labels",
            axis_strips(run, found["scale"], latents),
            "Rows of generated images, one row per discovered axis, coarse at the top; along a row its coordinate grows.",
            AXES + (TRAVERSALS_WITH_FACTORS.replace("latent", "axis") if names else "") + (MORE_AXES if len(live) > MAX_AXES else ""),
        )
    if clips is not None:
        add_clips(add, clips, latents)
    left, cost = ("Left, t", "; dashed, what they cost") if rated else ("T", "")
    add(
        "training",
        "Training",
        training_curves(run.log, method, latents, run.config.first_joint_step),
        "Curves over the training steps: the terms of the loss"
        + (", KL of each latent dimension, weight of the KL term." if rated else "."),
        TRAINING[method].format(left=left, cost=cost) + (RATES if rated else ""),
    )
    return figures


def add_clips(add: Callable[..., None], clips: Clips, latents: Latents) -> None:
    """The two figures of clips."""
    if len(latents.live) > 1:
        add(
            "trajectories",
            "Clips as paths through the latents",
            trajectories(clips, latents),
            "A path for each of a few clips, its points coloured from the first frame to the last, with three frames below.",
            TRAJECTORIES,
        )
    if np.isfinite(clips.curvature).any():
        count, frames, _ = clips.codes.shape
        add(
            "curvature",
            "How much the paths bend",
            curvatures(clips),
            "A dot per clip: curvature along the latents against curvature along the pixels.",
            CURVATURES.format(clips=count, frames=frames, latents=np.nanmean(clips.curvature), pixels=np.nanmean(clips.pixel_curvature)),
        )
