"""The report's tables: every score beside what it means and when it misleads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..evaluation.table import Scores, mean_of
from ..metrics.latents import LIVE_NATS
from .charts import MAX_AXES
from .markup import paragraph, section, table

NONE = "\N{EN DASH}"

PER_FACTOR = (("linear_r2", "Linear R²"), ("mcc_per_factor", "MCC"), ("mig_per_factor", "MIG"))

AXES_OF = {
    "latents": ("Live latents", "the latents as they are"),
    "scale": ("Scale", "by the noise level that decides them, all levels together"),
    "pca": ("PCA", "by how much the latents vary along them"),
    "gradient": ("Gradient", "by how strongly small changes of the pixels move them"),
    "ica": ("ICA", "by how independent they are over the data; tells axes of one scale apart"),
}

SCALE_TRAP = (
    "A trap to know about: these scores are blind to scale. From the mean response of the untrained encoder a linear map reaches R² "
    "{values}, a signal so faint that the latents' own noise drowns it. Every score in the tables is therefore computed from noisy "
    "samples of z, which hold no more than z really carries."
)
NOISELESS = (
    "A trap to know about: these scores are blind to scale, and the latents of this method are noiseless. Any trace of a factor counts, "
    "however faint, for the untrained encoder too; compare with methods whose latents are noisy only with that in mind."
)
DENSITY = (
    "The pixels are continuous, so this bounds a density, in units of pixel values from -1 to 1. It may be negative, and for noiseless "
    "pictures it keeps falling as schedule.logsnr_max rises: compare it only between runs with the same range."
)
DECODER_DENSITY = (
    "The pixels are continuous, so this bounds a density, in units of pixel values from -1 to 1. It may be negative, and for noiseless "
    "pictures it falls without limit as the decoder gets sharper: compare it only with runs of the same method on the same images."
)
PROBABILITY = "The pixels have 256 levels, so this bounds a probability: bits per dimension compare with those of other models."
SMALL_DISCOVERY = (
    "The report looks at few images for these axes; “sami-fast axes” takes more and writes them to a file that traverse, encode and edit "
    "can read."
)

RANKS = "What ranks the axes. Logsnr is the log of signal to noise, low where noise prevails; mu are the mean latents, x the pixels."


@dataclass(frozen=True)
class Line:
    """A row of the table of scores."""

    name: str
    read: Callable[[Scores], float | None]
    words: str
    digits: int = 3
    unit: str = ""

    def cell(self, scores: Scores) -> str:
        value = self.read(scores)
        return NONE if value is None else f"{value:.{self.digits}f}{self.unit}"


def _of(key: str) -> Callable[[Scores], float | None]:
    return lambda scores: scores.get(key)


def lines(scores: Scores) -> list[Line]:
    """Rows that these scores have a number for, each with what it means and when it misleads."""
    rated = scores["kl_nats"] is not None
    ceiling = f" A perfect code reaches {scores['mig_ceiling']:.2f} here." if "mig_ceiling" in scores else ""
    known = [
        Line("Information in z (KL)", _of("kl_nats"), "What the latents cost, and at most tell, per image.", 2, " nats"),
        Line(
            "Live latents",
            _of("active_dims"),
            f"Those that cost more than {LIVE_NATS:g} nats." if rated else "Those that vary at all: latents without noise have no cost.",
            0,
        ),
        Line(
            "Linear R²",
            lambda s: mean_of(s.get("linear_r2")),
            "Share of the factors' variance that a straight-line map reads from all latents, on images it was not fitted to; mean over "
            "factors. Says nothing about which latent holds what.",
        ),
        Line(
            "Nonlinear R²",
            lambda s: mean_of(s.get("nonlinear_r2")),
            "The same read by a small neural network. Well above linear R²: a factor is there, but bent or folded.",
        ),
        Line(
            "MCC",
            _of("mcc"),
            "Rank correlation of each factor with one latent of its own, mean over factors; 1 is perfect. A factor that goes round in a "
            "circle, such as an angle, cannot reach 1, and many latents raise it by chance.",
        ),
        Line(
            "MIG",
            _of("mig"),
            f"How far the best latent for a factor leads the second best, in shared information.{ceiling} Noise of z lowers it; a factor "
            "that needs two latents, such as an angle, scores near 0.",
        ),
        Line(
            "DCI disentanglement",
            _of("dci_d"),
            "Whether each latent serves one factor, judged by which latents decision trees use. The trees share correlated latents out as "
            "they like, and a noisy z lets a second latent help.",
        ),
        Line("DCI completeness", _of("dci_c"), "Whether each factor is held by one latent, by the same trees. A circle needs two latents."),
        Line(
            "DCI informativeness",
            _of("dci_i"),
            "How often the trees name a factor's class rightly. With many classes side by side, near misses count as wrong.",
        ),
        Line("SAP", _of("sap"), "Lead of the best latent over the second best in squared linear correlation. Blind to bent relations."),
        Line(
            "FactorVAE score",
            _of("factor_vae"),
            "How often the latent that varies least tells which factor was held fixed. Generous: saturates at 1.",
        ),
        Line(
            "BetaVAE score",
            _of("beta_vae"),
            "The same by a linear classifier. Very generous: stays near 1 for rotated latents, even with a factor missing.",
        ),
        Line(
            "Modularity",
            _of("modularity"),
            "Whether each latent shares information with one factor only. High for latents that know little; dead latents count.",
        ),
        Line(
            "Explicitness",
            _of("explicitness"),
            "How well a linear classifier names the factors' classes from all latents; chance is 0.5. Blind to which latent does it.",
        ),
        Line(
            "IRS",
            _of("irs"),
            "How little a latent moves when all but its own factor change, by the worst case. Not corrected for chance: noise scores 0.35.",
        ),
        *(
            Line(f"TAD, {name}", _of(f"tad_{key}"), words)
            for key, name, words in (
                (
                    "nashae",
                    "NashAE",
                    "Sum over well-captured attributes of how far the best latent leads the second best. Grows with their number.",
                ),
                ("infodiffusion", "InfoDiffusion", "The same under another paper's protocol; the two do not compare."),
            )
        ),
        *(
            Line(
                f"Attributes captured, {name}",
                _of(f"attributes_captured_{key}"),
                "Attributes that one latent alone tells well, and no other attribute gives away.",
                0,
            )
            for key, name in (("nashae", "NashAE"), ("infodiffusion", "InfoDiffusion"))
        ),
        Line(
            "Latent quality",
            _of("latent_quality"),
            "How well a linear classifier tells each attribute from all latents (area under the curve); chance is 0.5.",
        ),
        Line(
            "Total correlation",
            _of("total_correlation"),
            "What the latents share among each other, as if they were normally distributed; 0 is independent. Misses bent relations.",
            3,
            " nats",
        ),
    ]
    return [line for line in known if line.read(scores) is not None]


def score_section(scores: Scores, names: Sequence[str]) -> str:
    """Trained beside untrained: the means, then each factor."""
    before = scores["untrained"]
    rows = [(line.name, line.cell(scores), line.cell(before), line.words) for line in lines(scores)]
    means = table(
        f"The trained encoder beside the same encoder before its first step ({NONE}: not computed).",
        ("Score", "Trained", "Untrained", "What it says, and when it misleads"),
        rows,
        (1, 2),
    )
    columns = [(key, label) for key, label in PER_FACTOR if scores.get(key)]
    if not columns:
        return section("Scores", means)
    header = ["Factor", *(word for _, label in columns for word in (label, "untrained"))]
    by_factor = [
        (name, *(NONE if s.get(key) is None else f"{s[key][name]:.3f}" for key, _ in columns for s in (scores, before))) for name in names
    ]
    parts = [means, table("The same by factor.", header, by_factor, range(1, len(header)))]
    if scores["kl_nats"] is None:
        parts.append(paragraph(NOISELESS))
    else:
        values = ", ".join(f"{name} {before['linear_r2_mu'][name]:.2f}" for name in names)
        parts.append(paragraph(SCALE_TRAP.format(values=values)))
    return section("Scores", *parts)


def axis_tables(axes: Scores, names: Sequence[str]) -> str:
    """How the ways to find axes compare, and what ranks each axis."""
    methods = [method for method in AXES_OF if method in axes and method != "latents"]
    parts = []
    if "latents" in axes:
        rows = [
            (
                AXES_OF[method][0],
                AXES_OF[method][1],
                f"{axes[method]['mcc']:.3f}",
                *(f"{axes[method]['mcc_per_factor'][name]:.3f}" for name in names),
            )
            for method in ("latents", *methods)
        ]
        caption = (
            "Recovery of the known factors by each kind of axes: MCC, the rank correlation of each factor with one axis of its own. No "
            "method saw the factors. Where the latents are mixed, turned axes can do better; where they are not, these can spoil them."
        )
        parts.append(table(caption, ("Axes", "How they are chosen", "MCC", *names), rows, range(2, 3 + len(names))))
    count = min(MAX_AXES, len(axes["scale"]["score"]))
    rows = [(str(axis), *(_score(axes[method], axis) for method in methods)) for axis in range(count)]
    header = ["Axis", *(AXES_OF[method][0] for method in methods)]
    meanings = "; ".join(f"{AXES_OF[method][0]}: {axes[method]['score_name']}" for method in methods)
    parts.append(table(f"{RANKS} {meanings}.", header, rows, range(1, len(header))))
    return "".join(parts) + paragraph(SMALL_DISCOVERY)


def _score(found: Scores, axis: int) -> str:
    if (value := found["score"][axis]) is not None:
        return f"{value:.3g}"
    shares = found["undecided"][axis]  # of the variance, at each noise level
    return "below all levels" if sum(shares) < 0.5 * len(shares) else "above all levels"


def bound_section(scores: Scores) -> str:
    """The parts of the negative ELBO."""
    error, bits = scores["elbo_standard_error_nats"], scores["bits_per_dim"]
    spread = f", with a standard error of {error:.2f}" if error is not None else ""
    sami = "unguided_nats" in scores
    compared = f"{scores['unguided_nats']:.2f} for the same denoiser without guidance." if sami else "The denoiser's error, told z."
    rows = [
        ("Denoising, guided by z" if sami else "Denoising, told z", "diffusion_nats", compared),
        ("KL of z", "kl_nats", "The price of the latents."),
        ("Prior", "prior_nats", "What the noisiest level still shows of the image."),
        (
            "Reconstruction",
            "reconstruction_nats",
            ("From the cleanest level" if scores["method"] != "beta_vae" else "From the latents")
            + f": a Gaussian of standard deviation {scores['decoder_std']:.4f} around the model's guess.",
        ),
        ("Negative ELBO", "elbo_nats", f"The sum{spread}; {bits:.3f} bits per dimension."),
    ]
    density = DENSITY
    if scores["method"] == "beta_vae":  # it has no noise levels
        density = DECODER_DENSITY
        rows = [row for row in rows if row[1] not in ("diffusion_nats", "prior_nats")]
    return section(
        "The bound",
        paragraph(
            "A bound on an image's negative log likelihood, the yardstick of generative models: the smaller, the better the model explains "
            "the image. Its parts:"
        ),
        table(
            "Mean over the images, nats.",
            ("Term", "Nats", "What it is"),
            [(name, f"{scores[key]:.2f}", words) for name, key, words in rows],
            (1,),
        ),
        paragraph(density if scores["elbo_of"] == "density" else PROBABILITY),
    )
