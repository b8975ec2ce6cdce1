"""The figures of a report, each with its words."""

import io
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from ..metrics.latents import LIVE_NATS
from .charts import MAX_AXES, RHO, latents_against_factors, training_curves
from .run import Run
from .scores import Latents
from .strips import COVERAGE, reconstructions, samples, traversals

TRAVERSALS = (
    "One row per live latent, the most informative first. Along a row that latent moves through the range it takes on real images "
    f"(the middle {COVERAGE:.0%} of sampled z; its value is below each image), while the other latents and the noise stay as they are."
)
TRAVERSALS_WITH_FACTORS = " Each row names the factor its latent follows best, with their rank correlation."
MORE_AXES = f" Only the {MAX_AXES} most informative are shown."
RECONSTRUCTIONS = (
    "Above, images that the scores are measured on; below, what {steps} guided denoising steps make of fresh noise when all they know "
    "of the image is its latents."
)
SAMPLES = (
    "Above, images of the data. Middle, new images: latents drawn from the prior, then guided denoising of noise. "
    "Below, what the denoiser draws without latents."
)
LATENTS = (
    "A row per live latent, a column per factor; each dot is one image with one sample of z. A latent that recovers a factor draws a "
    f"narrow, monotonic band in one column and a featureless cloud in the others. |{RHO}| is the rank correlation."
)
TRAINING = (
    "Left, the error of the estimated noise with and without the encoder's guidance: the gap is what the latents are worth. Middle, "
    f"the information in each latent, one batch at a time; above {LIVE_NATS:g} nats it counts as live. Right, the price β of a nat."
)


@dataclass(frozen=True)
class ReportFigure:
    """A figure as the page shows it, and as it lies in the report folder."""

    name: str  # of the file, without .png
    title: str
    png: bytes
    alt: str
    caption: str


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # No version in the file: the same run gives the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def make_figures(run: Run, latents: Latents, factors: np.ndarray) -> list[ReportFigure]:
    """All figures in the order of the page: traversals and scatter only with live latents, scatter only with factors.

    Args:
        run: The run.
        latents: Of its evaluation images.
        factors: [N, F] of the same images, F may be 0.
    """
    names, live = run.evaluation.factor_names, latents.live
    more = MORE_AXES if len(live) > MAX_AXES else ""
    figures = []
    if len(live):
        figures.append(
            ReportFigure(
                "traversals",
                "What each latent does",
                _png(traversals(run, latents, factors)),
                "Rows of generated images, one row per live latent; along a row that latent grows and everything else stays fixed.",
                TRAVERSALS + (TRAVERSALS_WITH_FACTORS if names else "") + more,
            )
        )
    figures += [
        ReportFigure(
            "reconstructions",
            "Reconstructions",
            _png(reconstructions(run)),
            "Two rows of images: inputs above, their reconstructions below.",
            RECONSTRUCTIONS.format(steps=run.config.report.sample_steps),
        ),
        ReportFigure(
            "samples",
            "Samples",
            _png(samples(run)),
            "Three rows of images: data, generated images, and what the denoiser draws without latents.",
            SAMPLES,
        ),
    ]
    if len(live) and names:
        figures.append(
            ReportFigure(
                "latents",
                "Latents against factors",
                _png(latents_against_factors(latents, factors, names)),
                f"Scatter plots of the live latents against {', '.join(names)}.",
                LATENTS + more,
            )
        )
    figures.append(
        ReportFigure(
            "training",
            "Training",
            _png(training_curves(run.log, live, run.config.first_joint_step)),
            "Three curves over the training steps: denoising error, KL of each latent dimension, weight of the KL term.",
            TRAINING,
        )
    )
    return figures
