"""The report of small runs: what metrics.json holds, what the page is made of and does, what a user is told when it cannot be written."""

import base64
import copy
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import sys
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browser import SIZES, open_page
from helpers import log_rows
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sami_fast.cli import main, parser
from sami_fast.config import load_config, to_yaml
from sami_fast.engine.monitors import show_report
from sami_fast.errors import UserError
from sami_fast.evaluation import Latents, encode, known_factors, open_run, profile
from sami_fast.evaluation.health import mended
from sami_fast.evaluation.latents import untrained
from sami_fast.latents.axes import Axes
from sami_fast.latents.discovery import discover
from sami_fast.latents.extremes import extremes
from sami_fast.methods.build import build_model
from sami_fast.methods.registry import load_model
from sami_fast.metrics.identifiability import correlation_matrix, mcc
from sami_fast.metrics.straightness import clip_straightness
from sami_fast.report import _kept_scores, write_report
from sami_fast.report.advice import next_commands, run_argument
from sami_fast.report.cards import Gallery, captions, latent_names
from sami_fast.report.charts import (
    COLOURS,
    DARK,
    INK,
    MATRIX_ROWS,
    calibration,
    correlations,
    information,
    line,
    literal,
    scatter_fits,
    svg,
    training_curves,
)
from sami_fast.report.discoveries import axis_scores, discoveries
from sami_fast.report.motion import Clips, curvatures, read_clips, trajectories
from sami_fast.report.page import BASELINES, TEMPLATES, command_line
from sami_fast.report.sheets import MOST_BYTES, Sheet, sheet
from sami_fast.report.strips import PNG_BYTES, Strip, axis_strips, fitted_latents, png, strips, traversals

LATENTS = 3
SMALL = [
    "data.image_size=8",
    f"encoder.latent_size={LATENTS}",
    "encoder.channels=[8,8]",
    "denoiser.channels=[8,8]",
    "denoiser.embedding_size=8",
    "train.steps=30",
    "train.denoiser_warmup=0.33",
    "report.images=96",
    "report.sample_steps=2",
    "seed=7",
]
NUMBERS = {
    "elbo_nats", "elbo_standard_error_nats", "bits_per_dim", "diffusion_nats", "unguided_nats", "prior_nats", "reconstruction_nats",
    "decoder_std", "kl_nats", "images_per_second", "wall_seconds",
}  # fmt: skip
WHOLE = {"active_dims", "steps", "seed", "num_images"}
OF_FACTORS = {"mcc", "mig", "mig_ceiling"}
BY_FACTOR = {"linear_r2", "linear_r2_mu", "mcc_per_factor", "mig_per_factor"}
VOID = {"meta", "img", "input"}
RUNS = ("disks", "array", "collapsed", "vae", "diffae")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{}'; base-uri 'none'; form-action 'none'"
HOSTILE = "<img src=x onerror=alert(1)>$x"  # of a file, a factor, an axis


def make_run(folder: Path, *overrides: str, kl: str = "informative") -> Path:
    """A run folder as training leaves it, with networks that have not been trained.

    Args:
        kl: "informative" for latents far from the prior, "none" for a collapsed posterior.
    """
    recipe = folder.parent / "small.yaml"  # a file, of which methods may leave a part without use
    recipe.write_text("\n".join(one.replace("=", ": ", 1) for one in SMALL))
    config = load_config(str(recipe), [f"runs_dir={folder.parent}", f"name={folder.name}", *overrides])
    model = build_model(config, (1, 8, 8))
    with torch.no_grad():
        encoder = model.encoder
        if kl == "informative":
            encoder.mu.weight.mul_(20.0)
            encoder.raw_var.bias.fill_(-1.0)
        else:
            for head in (encoder.mu, encoder.raw_var):
                head.weight.zero_()
            encoder.mu.bias.zero_()
    folder.mkdir()
    model.save_pretrained(folder / "model")
    (folder / "config.yaml").write_text(to_yaml(config))
    environment = {"sami_fast": "0.1.0", "commit": None, "command": ["train.py", "--local_rank=0", "name=<script>alert('&')</script>"]}
    (folder / "environment.json").write_text(json.dumps(environment))
    lines = [json.dumps(row) for row in log_rows(config)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 35, "loss_na')  # the last line cut short by a kill
    return folder


def save_images(folder: Path, count: int) -> Path:
    """8-bit images of smooth gradients, without factors."""
    generator = np.random.default_rng(0)
    slope, offset = generator.uniform(-8, 8, (2, count, 1, 1)), generator.uniform(60, 190, (count, 1, 1))
    y, x = np.indices((8, 8)) - 3.5
    path = folder / "images.npy"
    np.save(path, (slope[0] * x + slope[1] * y + offset).clip(0, 255).astype(np.uint8))
    return path


@pytest.fixture(scope="module")
def disks(tmp_path_factory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "disks")
    assert write_report(folder) == folder / "report" / "index.html"
    return folder


@pytest.fixture(scope="module")
def array(tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    # More latents than a picture has rows or a legend entries.
    folder = make_run(runs / "array", "data.kind=array", f"data.path={save_images(runs, 60)}", "data.holdout=0.2", "encoder.latent_size=14")
    write_report(str(folder))
    return folder


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "collapsed", kl="none")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    """A beta-VAE on sprites, whose data have clips."""
    folder = make_run(tmp_path_factory.mktemp("runs") / "vae", "method=beta_vae", "data.kind=sprites", "data.video.clip_length=5")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def diffae(tmp_path_factory) -> Path:
    """Latents without noise."""
    folder = make_run(tmp_path_factory.mktemp("runs") / "diffae", "method=diffae")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Files whose names, as that of a factor and of an axis, are markup and mathematics."""
    runs = tmp_path_factory.mktemp("runs")
    (runs / "photos").mkdir()
    rows = ["file," + HOSTILE]
    for number, pixels in enumerate(np.load(save_images(runs, 40))):
        Image.fromarray(pixels).save(runs / "photos" / f"{HOSTILE}{number}.png")
        rows.append(f"{HOSTILE}{number}.png,{pixels.mean():.3f}")
    (runs / "labels.csv").write_text("\n".join(rows))
    data = [f"data.path={runs / 'photos'}", f"data.labels={runs / 'labels.csv'}", f"data.cache_dir={runs / 'cache'}"]
    folder = make_run(runs / "run", "data.kind=image_folder", *data, "data.channels=1", "data.holdout=0.5")
    Axes((HOSTILE,), np.array([[0.01, -2.0, 0.0]]), np.array([[0.0, -0.5, 0.0]]), np.zeros(3)).save(folder / "axes.npz")
    write_report(folder)
    return folder


def scores_of(folder: Path) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"metrics.json holds {constant}, which is not JSON")

    return json.loads((folder / "report" / "metrics.json").read_text(), parse_constant=refuse)


def shown(text: str) -> str:
    """As a browser shows it outside `pre`: white space, line ends too, is one blank."""
    return re.sub(r"\s+", " ", text)


def part(name: str, **context: object) -> str:
    """One template of the page by itself."""
    return TEMPLATES.get_template(f"{name}.html").render(context)


def rows_of(html: str) -> list[list[str]]:
    """Texts of the cells of all tables, row by row."""
    rows = re.findall("<tr>(.*?)</tr>", html, re.DOTALL)
    return [[unescape(shown(cell)).strip() for cell in re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", row, re.DOTALL)] for row in rows]


class Page(HTMLParser):
    """Collects what the tests ask about, and fails on tags that do not close."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.html = (folder / "report" / "index.html").read_text()
        self.feed(self.html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        self.text += "\n" if tag == "pre" else ""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.text += "\n" if tag == "pre" else ""

    def handle_data(self, data):
        if self.open and self.open[-1] not in {"style", "script"}:
            self.text += data if "pre" in self.open else shown(data)

    def images(self) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


# metrics.json


def test_metrics_of_disks(disks):
    scores = scores_of(disks)
    assert set(scores) >= NUMBERS | WHOLE | OF_FACTORS | BY_FACTOR | {"kl_per_dim", "elbo_of", "untrained", "axes"}
    assert all(isinstance(scores[key], float) and math.isfinite(scores[key]) for key in NUMBERS | OF_FACTORS)
    assert all(type(scores[key]) is int for key in WHOLE)
    for key in BY_FACTOR:
        assert list(scores[key]) == ["x", "y", "background"]
        assert all(isinstance(value, float) for value in scores[key].values())
    assert (scores["steps"], scores["seed"], scores["num_images"]) == (30, 7, 96)
    assert scores["wall_seconds"] == 15.0
    assert scores["images_per_second"] == 122.5  # the median of the joint steps' intervals: 115, 120, 125, 130
    assert scores["elbo_of"] == "density"


def test_metrics_agree_with_each_other(disks):
    scores = scores_of(disks)
    terms = ("diffusion_nats", "kl_nats", "prior_nats", "reconstruction_nats")
    assert scores["elbo_nats"] == pytest.approx(sum(scores[key] for key in terms), rel=1e-5)
    assert scores["bits_per_dim"] == pytest.approx(scores["elbo_nats"] / (64 * math.log(2)))
    assert scores["kl_nats"] == pytest.approx(sum(scores["kl_per_dim"]))
    assert scores["information_sum_nats"] == pytest.approx(sum(scores["information_per_dim"]))
    assert scores["active_dims"] == sum(nats > 0.05 for nats in scores["information_per_dim"]) == LATENTS
    assert scores["mcc"] == pytest.approx(sum(scores["mcc_per_factor"].values()) / 3)
    assert scores["mig"] == pytest.approx(sum(scores["mig_per_factor"].values()) / 3)


def test_metrics_of_what_a_run_is_compared_with(disks):
    scores = scores_of(disks)
    assert set(scores["untrained"]) >= {"kl_nats", "kl_per_dim", "active_dims", "mcc", "mig"} | BY_FACTOR
    assert scores["untrained"]["kl_nats"] < scores["kl_nats"]
    assert set(scores["pca"]) >= {"mcc", "mig", "sap"} | BY_FACTOR
    run = open_run(disks)
    pixels, (factors, *_) = run.images(torch.arange(96)).flatten(1).numpy(), known_factors(run)
    assert scores["pixels"]["mcc"] == pytest.approx(mcc(pixels, factors)[0])
    assert scores["pca"]["linear_r2"]["background"] > 0.9  # a straight line through pixels tells how bright it is


def test_untrained_is_the_network_before_the_first_step(disks):
    run, state = open_run(disks), torch.random.get_rng_state()
    fresh = untrained(run)
    assert torch.equal(torch.random.get_rng_state(), state)
    first = build_model(run.config, run.evaluation.image_shape)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), first.parameters(), strict=True))


def test_metrics_without_factors(array):
    scores = scores_of(array)
    assert set(scores) >= NUMBERS | WHOLE | {"kl_per_dim", "elbo_of", "untrained"}
    assert not set(scores) & (OF_FACTORS | BY_FACTOR | {"axes", "clip_curvature"})
    assert scores["num_images"] == 12  # all that are held out
    assert scores["elbo_of"] == "8-bit pixels"
    assert scores["bits_per_dim"] > 0
    assert scores["active_dims"] == len(scores["kl_per_dim"]) == 14
    assert set(scores["untrained"]) >= {"kl_nats", "kl_per_dim", "active_dims"}


def test_metrics_of_a_collapsed_encoder(collapsed):
    scores = scores_of(collapsed)
    assert scores["active_dims"] == 0
    assert scores["kl_nats"] < 0.05
    assert scores["information_sum_nats"] < 0.05
    assert max(scores["linear_r2"].values()) < 0.5


def test_metrics_of_the_axes(disks):
    axes, run = scores_of(disks)["axes"], open_run(disks)
    latents, (factors, names, _) = encode(run, run.model), known_factors(run)
    assert set(axes) == {"latents", "scale", "pca", "gradient", "ica", "logsnr_levels"}
    assert axes["latents"]["mcc"] == pytest.approx(mcc(latents.z, factors)[0])
    for method in ("scale", "pca", "gradient", "ica"):
        assert len(axes[method]["score"]) == len(axes[method]["undecided"]) == LATENTS
        assert list(axes[method]["mcc_per_factor"]) == list(names)
    assert sum(axes["pca"]["score"]) == pytest.approx(1.0)


def test_metrics_of_the_clips(vae):
    scores, run = scores_of(vae), open_run(vae)
    frames = run.evaluation.clips(torch.arange(4))  # [4, 5, 1, 8, 8]
    mu = run.model.encode(frames.flatten(0, 1)).mu.detach().unflatten(0, (4, 5))
    assert scores["clip_curvature"][:4] == pytest.approx(clip_straightness(mu.numpy()).curvature, abs=1e-2)
    assert scores["clip_pixel_curvature"][:4] == pytest.approx(clip_straightness(frames.flatten(2).numpy()).curvature, abs=1e-3)
    assert scores["method"] == "beta_vae"


def test_metrics_of_noiseless_latents(diffae):
    scores = scores_of(diffae)
    assert scores["method"] == "diffae"
    assert scores["kl_nats"] is None
    assert not {"axes", "information_nats", "elbo_nats"} & scores.keys()


def test_same_run_same_scores(disks):
    before = (disks / "report" / "metrics.json").read_text()
    write_report(disks)
    assert (disks / "report" / "metrics.json").read_text() == before


def test_the_page_says_how_the_run_is_doing(disks, collapsed, vae, diffae):
    for run, word in ((collapsed, "collapsed"), (disks, None), (vae, None)):
        health = scores_of(run)["health"]
        assert word in (None, health["word"])
        assert f"Health: {health['word']}." in Page(run).text
        assert not health["remedy"] or health["remedy"] in Page(run).text
    assert "Health" not in Page(diffae).text  # nothing is known of noiseless latents
    scores = scores_of(disks)
    assert scores["gain_per_kl"] == pytest.approx(scores["gain_nats"] / scores["kl_nats"])
    assert len(scores["gain_by_level"]) == len(scores["zscore_square_by_level"]) == len(scores["gain_logsnr"])


# Pictures


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ("disks", {"correlations", "latents", "information", "calibration", "guidance"}),
        ("array", {"information", "calibration", "guidance"}),
        ("collapsed", set()),
        ("vae", {"correlations", "latents", "information", "calibration", "trajectories", "curvature"}),
        ("diffae", {"correlations", "latents"}),
    ],
)
def test_pictures(run, expected, request):
    folder, charts = request.getfixturevalue(run), expected | {"training"}
    rows = {"reconstructions", "samples"} | ({"axes"} if run == "disks" else set()) | ({"traversals"} if run != "collapsed" else set())
    files = {file.name for file in (folder / "report").iterdir()}
    written = {f"{name}.png" for name in rows} | {f"{name}.svg" for name in charts}
    assert files == written | {"index.html", "metrics.json"}  # nothing partial stays
    assert len(Page(folder).images()) == len(charts)


def test_pictures_of_an_earlier_report_go(collapsed):
    (collapsed / "report" / "traversals.png").write_bytes(b"old")
    write_report(collapsed)
    assert not (collapsed / "report" / "traversals.png").exists()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("side", [8, 100])
def test_strips_of_any_channels_and_size(channels, side):
    images = torch.rand(3, channels, side, side) * 3 - 1.5
    canvas = FigureCanvasAgg(strips([Strip("two\nlines", images, ("a", "b", "c")), Strip("shorter", images[:2])]))
    canvas.draw()
    assert canvas.get_width_height()[0] > 3 * 100


def test_strips_keep_pixels():
    """An image of 4 x 4 random grey levels is found again in the drawn picture, each level a square of 40 pixels."""
    levels = torch.randint(0, 256, (1, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    canvas = FigureCanvasAgg(strips([Strip("", levels / 127.5 - 1.0)]))
    canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())[..., 0].astype(int)
    expected = levels[0, 0].numpy().repeat(40, 0).repeat(40, 1)
    assert np.abs(drawn[24:184, -184:-24] - expected).max() <= 1


def test_large_images_are_shrunk():
    canvas = FigureCanvasAgg(strips([Strip("", torch.full((2, 3, 400, 400), 0.2))]))
    canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())
    assert drawn.shape[:2] == (24 + 160 + 24, 24 + 160 + 8 + 160 + 24)  # no room for labels where there are none
    assert (drawn[24:184, -184:-24, 0] == 153).all()


def test_png_of_many_colours_is_reduced_and_its_paper_stays_white():
    images = torch.rand(9, 3, 160, 160, generator=torch.Generator().manual_seed(0)) * 2 - 1
    written = png(strips([Strip("", images)] * 12))
    picture = Image.open(io.BytesIO(written))
    assert picture.mode == "P"
    assert (np.asarray(picture.convert("RGB"))[:20] == 255).all()
    assert len(written) < 3_500_000  # of pure noise, which no photograph is: two such pictures leave a page below 10 MB
    assert len(png(strips([Strip("", images[:1])]))) <= PNG_BYTES


def latents_of(z: np.ndarray) -> Latents:
    """Codes without noise worth mentioning; the last dimension is the most informative."""
    return Latents(z, np.full_like(z, 1e-4), z, np.arange(z.shape[1]) + 1.0, np.arange(z.shape[1])[::-1])


def test_correlations_are_drawn_in_the_order_of_the_rates():
    generator = np.random.default_rng(0)
    latents, factors = latents_of(generator.normal(size=(200, 3))), generator.normal(size=(200, 2))
    factors[:, 1] = -np.exp(latents.z[:, 2])
    figure = correlations(latents, correlation_matrix(latents.z, factors), ("a", "b"))
    drawn = np.asarray(figure.axes[0].images[0].get_array())
    assert drawn == pytest.approx(correlation_matrix(latents.z, factors).T[::-1])
    assert drawn[0, 1] == 1
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["z2", "z1", "z0"]
    assert "1.00" in {text.get_text() for text in figure.axes[0].texts}


def test_correlations_of_many_latents_and_factors():
    """As many as CelebA's attributes: no numbers in the cells, no scatter plots."""
    generator = np.random.default_rng(0)
    latents, names = latents_of(generator.normal(size=(50, 40))), [f"attribute_{number}" for number in range(40)]
    figure = correlations(latents, generator.uniform(size=(40, 40)), names)
    assert figure.axes[0].images[0].get_array().shape == (MATRIX_ROWS, 40)
    assert not figure.axes[0].texts
    assert not scatter_fits(latents, names)
    assert scatter_fits(latents_of(np.zeros((9, 3))), ["x", "y", "background"])
    png(figure)


def test_each_latent_has_a_line_of_its_own():
    styles = {str(sorted(line(rank).items())) for rank in range(2 * len(COLOURS))}
    assert len(styles) == 2 * len(COLOURS)


def test_noise_levels_are_drawn_as_measured(disks):
    run = open_run(disks)
    latents, measured = encode(run, run.model), profile(run)
    axes = information(measured, latents, run.images(torch.tensor([0]))).axes[0]
    curves = [curve for curve in axes.lines if len(curve.get_xdata()) == len(measured.logsnr)]
    for drawn, dim in zip(curves, latents.live, strict=True):
        assert drawn.get_ydata() == pytest.approx(measured.information[:, dim])
        assert drawn.get_label().startswith(f"z{dim}")
    dots = [(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in axes.lines if dot.get_marker() == "o"]
    assert dots == [(measured.scale[d], measured.clean[d] / 2) for d in latents.live if np.isfinite(measured.scale[d])]
    assert "mostly noise" in axes.get_xlabel()
    assert "nearly clean" in axes.get_xlabel()

    panels = calibration(measured, latents).axes
    for panel, values, target in zip(panels, (measured.calibration_std, measured.calibration_mean), (1.0, 0.0), strict=True):
        assert [list(curve.get_ydata()) for curve in panel.lines[:-1]] == [list(values[:, d]) for d in latents.live]
        assert list(panel.lines[-1].get_ydata()) == [target, target]


def test_axis_strips_go_through_the_range_of_the_data(disks):
    run = open_run(disks)
    latents = encode(run, run.model)
    found = discover(run.model, run.images, 32, draws=2, num_steps=4, logsnr=[-2.0, 2.0])[0]
    figure = strips(axis_strips(run, found, latents))
    assert len(figure.images) == 9 * LATENTS
    texts = [text.get_text() for text in figure.texts]
    assert [text.split("\n")[0].split(" · ")[0] for text in texts if text.startswith("scale")] == list(found.names)
    coordinates = (latents.z - found.center) @ found.readouts[0]
    first = texts.index(next(text for text in texts if text.startswith(found.names[0])))
    assert [float(text) for text in texts[first + 1 : first + 10]] == pytest.approx(
        np.linspace(*np.quantile(coordinates, (0.025, 0.975)), 9), abs=0.051
    )


def test_axes_that_undo_a_rotation_recover_the_factors(disks):
    run = open_run(disks)
    found = discover(run.model, run.images, 32, draws=2, num_steps=4, logsnr=[-2.0, 2.0])[0]
    generator = np.random.default_rng(0)
    rotation, factors = np.full((3, 3), -2 / 3) + np.eye(3), generator.uniform(size=(500, 3))
    latents = latents_of(factors @ rotation + 1.0)
    found = replace(found, directions=rotation, readouts=rotation, center=np.ones(3), score=np.array([np.nan, -1.5, np.nan]))
    scores = axis_scores({"scale": found}, latents, factors, ("a", "b", "c"), {})
    assert scores["scale"]["mcc"] == pytest.approx(1.0)
    assert scores["latents"]["mcc"] < 0.9
    assert scores["scale"]["score"] == [None, -1.5, None]
    scores["scale"]["undecided"] = [[0.1, 0.0], [0.8, 0.2], [0.9, 0.8]]
    tables = part("axes", axes=scores, names=("a", "b", "c"))
    assert "1.000" in tables
    assert re.search("below all levels.*-1.5.*above all levels", tables, re.DOTALL)
    assert set(axis_scores({"scale": found}, latents, factors[:, :0], (), {})) == {"scale", "logsnr_levels"}  # nothing to compare with


def test_no_axes_where_there_is_nothing_to_find(array, collapsed, vae):
    for folder in (array, collapsed, vae):
        run = open_run(folder)
        assert discoveries(run, encode(run, run.model)) == {}


def test_paths_keep_their_lengths():
    """Clips in a plane of five dimensions: seen in it, every step is as long as it is."""
    generator = np.random.default_rng(0)
    plane = np.linalg.qr(generator.normal(size=(5, 2)))[0].T
    codes = generator.normal(size=(4, 6, 2)) @ plane
    clips = Clips(torch.zeros(4, 6, 3, 8, 8), codes, np.array([10.0, np.nan, 5.0, 0.0]), np.full(4, 90.0))
    figure = trajectories(clips, latents_of(generator.normal(size=(30, 2)) @ plane))
    panels = [axes for axes in figure.axes if axes.get_title(loc="left").startswith("clip")]
    for panel, clip in zip(panels, codes, strict=True):
        drawn = panel.lines[0].get_xydata()
        assert np.linalg.norm(np.diff(drawn, axis=0), axis=1) == pytest.approx(np.linalg.norm(np.diff(clip, axis=0), axis=1))
    assert [panel.get_title(loc="left") for panel in panels[:2]] == ["clip 0: bends by 10° a frame", "clip 1: stands still"]
    (dots,) = curvatures(clips).axes[0].collections
    assert np.asarray(dots.get_offsets())[[0, 2]].tolist() == [[90.0, 10.0], [90.0, 5.0]]
    png(figure)


def test_clips_are_read_only_where_there_are_any(disks, vae, tmp_path):
    assert read_clips(open_run(disks)) is None
    assert read_clips(open_run(vae)).frames.shape == (6, 5, 1, 8, 8)
    short = make_run(tmp_path / "short", "data.kind=sprites", "data.video.clip_length=2")
    assert read_clips(open_run(short)) is None


def test_fitted_latents_have_the_moments_of_the_data():
    generator = torch.Generator().manual_seed(0)
    mu = torch.randn(400, 3, generator=generator).double() @ torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.0]]).double() + 3
    drawn = fitted_latents(mu, torch.randn(40000, 3, generator=generator))
    assert drawn.dtype == torch.float32
    assert torch.allclose(drawn.mean(0), mu.mean(0).float(), atol=0.05)  # 2.2 / sqrt(40000) is 0.011
    assert torch.allclose(drawn.T.cov(), mu.T.cov().float(), atol=0.15)
    assert torch.equal(fitted_latents(mu[:1], torch.randn(2, 3)), mu[:1].float().expand(2, 3))


# The page


@pytest.mark.parametrize("run", RUNS)
def test_page_needs_nothing_else(run, request):
    page = Page(request.getfixturevalue(run))
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "object", "embed", "base", "a"}
        for name in {"src", "href", "srcset"} & attributes.keys():
            assert (tag, name) == ("img", "src")
            assert attributes[name].startswith("data:image/svg+xml;base64,")
        assert not any(name.startswith("on") for name in attributes)
    assert all(attributes.get("alt", "").strip() for attributes in page.images())
    scripts = re.findall("<script>(.*?)</script>", page.html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": POLICY.format(digest)}) in page.tags
    assert len(scripts) == 1
    assert all(place.startswith("data:image/") for place in re.findall(r"url\((.{11})", page.html))
    assert "@import" not in page.html
    assert len(page.html) < 3_000_000


def test_page_is_a_document(disks):
    page = Page(disks)
    assert page.html.startswith("<!DOCTYPE html>")
    tags = [tag for tag, _ in page.tags]
    assert [tags.count(tag) for tag in ("html", "title", "main", "h1")] == [1, 1, 1, 1]
    assert "prefers-color-scheme: dark" in page.html
    assert ("html", {"lang": "en"}) in page.tags


def test_page_shows_command_config_and_environment(disks):
    page = Page(disks)
    assert "python train.py 'name=<script>alert('\"'\"'&'\"'\"')</script>'" in page.text  # escaped, and without the launcher's argument
    assert "latent_size: 3" in page.text
    assert '"sami_fast": "0.1.0"' in page.text


@pytest.mark.parametrize("run", RUNS)
def test_commands_of_the_page_are_commands(run, request):
    folder = request.getfixturevalue(run)
    first, _, made = Page(folder).text.rpartition("How it was made")
    commands = re.findall("^sami-fast (.*)$", made, re.MULTILINE)
    along = {"disks": ["axes", "traverse", "traverse"], "collapsed": []}.get(run, ["traverse"])
    names = ["report", "evaluate", *along, "encode"]
    assert [command.split()[0] for command in commands] == names
    for command in commands + re.findall("^sami-fast (.*)$", first, re.MULTILINE):
        arguments = parser().parse_args(shlex.split(command))
        if command.startswith("train "):
            assert load_config(arguments.config, arguments.overrides).name == f"{folder.name}_next"
        else:
            assert arguments.run in (str(folder), [str(folder)])


def test_commands_ask_for_trust_where_a_run_names_a_class(tmp_path):
    named = f"{Path(__file__).with_name('own_datasets.py')}:Pixels"
    folder = make_run(tmp_path / "run", "data.kind=class", f"data.class={named}", "report.images=16")
    write_report(folder, trust_remote_code=True)
    page = Page(folder)
    assert f"Trained on the images in {named}," in page.text
    commands = [line for line in page.text.splitlines() if line.startswith("sami-fast ") and not line.startswith("sami-fast train")]
    assert len(commands) > 3
    assert all(parser().parse_args(shlex.split(line)[1:]).trust for line in commands)
    run = open_run(folder, trust_remote_code=True)
    given = replace(run.config, data=replace(run.config.data, kind="given", class_=""))
    for objects in (replace(run, config=given), replace(run, model=copy.copy(run.model))):
        if objects.model is not run.model:
            objects.model.architecture = None
        assert run_argument(objects) is None
        assert next_commands(objects, scores_of(folder)) == []


@pytest.mark.parametrize(
    ("run", "says", "does_not_say"),
    [
        ("disks", ["SAMI run", "denoiser alone", "Axes found without labels", "guided denoising"], ["baseline that"]),
        ("vae", ["β-VAE run", "decoder makes of their latents", "never shows its encoder a noisy image"], ["SAMI run", "guided", "denois"]),
        ("diffae", ["Diffusion autoencoder run", "is told the image's latents", "has no prior"], ["SAMI run", "guided", "KL", "The bound"]),
    ],
)
def test_page_speaks_of_its_method(run, says, does_not_say, request):
    folder = request.getfixturevalue(run)
    page = Page(folder)
    words = page.text.rpartition("How it was made")[0]  # configuration and environment name everything
    alts = " ".join(image["alt"] for image in page.images()) + ("denoiser alone" if run == "disks" else "")
    for text in says:
        assert text in words + alts
    for text in does_not_say:
        assert text not in words


def test_every_score_is_explained():
    """Those without a value are left out; of an attribute's data none of the factors' scores is asked for."""
    numbers = {"kl_nats": 9.0, "active_dims": 3, "mcc": 0.5, "mig": 0.4, "mig_ceiling": 0.93, "dci_d": 0.31, "dci_c": 0.32, "dci_i": 0.33}
    numbers |= {"sap": 0.34, "factor_vae": 0.35, "beta_vae": 0.36, "modularity": 0.37, "explicitness": 0.38, "irs": None}
    numbers |= {"linear_r2": {"x": 0.9, "y": 0.7}, "nonlinear_r2": {"x": 0.95, "y": 0.75}, "total_correlation": 0.2}
    untrained = {"linear_r2_mu": {"x": 0.5, "y": 0.6}}
    others = {"untrained": untrained, "pca": {"linear_r2": {"x": 0.6, "y": 0.8}}, "pixels": {}}
    _, *rows = rows_of(part("scores", scores=numbers | others, names=("x", "y")).partition("The same by factor")[0])
    explained = {name: cells for name, *cells in rows}
    assert [explained[name][0] for name in ("Linear R²", "Nonlinear R²", "DCI completeness", "BetaVAE score")] == [
        "0.800", "0.850", "0.320", "0.360",
    ]  # fmt: skip
    assert [explained["Linear R²"][column] for column in range(4)] == ["0.800", "\N{EN DASH}", "0.700", "\N{EN DASH}"]
    assert "IRS" not in explained
    assert "0.93" in explained["MIG"][-1]
    assert all(words.endswith(".") and len(words) > 20 for *_, words in explained.values())
    assert explained["BetaVAE score"][1] == "\N{EN DASH}"
    assert list(BASELINES) == ["untrained", "pca", "pixels"]  # the columns after the run's own

    attributes = {"kl_nats": 9.0, "active_dims": 3, "tad_nashae": 0.21, "attributes_captured_nashae": 4, "latent_quality": 0.8}
    section = part("scores", scores=attributes | {"untrained": attributes}, names=("smiling", "hat"))
    assert "0.210" in section
    assert "by factor" not in section
    assert "Linear" not in section


def test_page_shows_the_scores(disks):
    page, scores = Page(disks), scores_of(disks)
    for value in (scores["mcc"], *(scores[other]["mcc"] for other in BASELINES), scores["mig"], scores["linear_r2"]["y"]):
        assert f"{value:.3f}" in page.text
    assert "blind to scale" in page.text
    assert "bounds a density" in page.text


def test_page_without_factors(array):
    page = Page(array)
    assert "MCC" not in page.text
    assert "factor" not in page.text
    assert "bounds a probability" in page.text
    assert "Only the first 12 are shown" in page.text


def test_page_says_that_the_posterior_collapsed(collapsed):
    page = Page(collapsed)
    assert "The posterior has collapsed" in page.text
    assert ("p", {"id": "health", "class": "verdict alarm"}) in page.tags
    (command,) = re.findall(r"^sami-fast train --config (.*)$", page.text.partition("How it was made")[0], re.MULTILINE)
    config = load_config(*(lambda file, *settings: (file, settings))(*shlex.split(command)))
    assert (config.kl_weight.kind, config.train.mode, config.name) == ("auto", "staged", "collapsed_next")


def test_report_of_a_single_held_out_image(tmp_path):
    path = save_images(tmp_path, 9)
    folder = make_run(tmp_path / "run", "data.kind=array", f"data.path={path}")
    write_report(folder)
    scores = scores_of(folder)
    assert scores["num_images"] == 1
    assert scores["elbo_standard_error_nats"] is None


def test_report_of_images_that_training_saw(tmp_path):
    folder = make_run(tmp_path / "run", "data.kind=array", f"data.path={save_images(tmp_path, 20)}", "data.holdout=0")
    (folder / "environment.json").write_text(json.dumps({"command": ["sami-fast", os.fsdecode(b"name=\xff")]}))  # not UTF-8
    write_report(folder)
    assert "sami-fast 'name=\\udcff'" in Page(folder).text
    assert scores_of(folder)["num_images"] == 20
    assert "none are held out" in Page(folder).text


# The page in a browser


def address(folder: Path) -> str:
    return (folder / "report" / "index.html").as_uri()


def overflow(page) -> int:
    """How much wider the page is than its window, with everything that is folded shown. Pixels."""
    page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    return page.evaluate("document.documentElement.scrollWidth - innerWidth")


@pytest.mark.parametrize(("size", "scheme"), [("desktop", "light"), ("phone", "dark")])
@pytest.mark.parametrize("run", ["disks", "array", "collapsed", "vae"])
def test_page_in_a_browser_is_silent_and_fits(run, size, scheme, request):
    file = address(request.getfixturevalue(run))
    with open_page(size, scheme) as (page, seen):
        page.goto(file)
        assert page.locator("#health").bounding_box()["y"] < SIZES[size][1]  # on the first screen
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(re.search(r"\d+", paper)[0]) < 64) == (scheme == "dark")
        assert overflow(page) <= 0
        assert (seen.console, seen.requests) == ([], [file])


@pytest.mark.parametrize("size", SIZES)
def test_a_slider_moves_its_latent(disks, size):
    """By key and by pointer, each slider its own picture."""
    with open_page(size) as (page, seen):
        page.goto(address(disks))
        player, other = page.locator(".player").nth(0), page.locator(".player").nth(1).locator(".picture")
        slider, picture, output = player.locator("input"), player.locator(".picture"), player.locator("output")
        values = [float(value) for value in slider.get_attribute("data-values").split()]
        before = other.evaluate("it => getComputedStyle(it).backgroundPosition")
        shown = []
        slider.focus()
        page.keyboard.press("Home")
        for place in (0, 1):
            assert output.text_content() == f"{values[place]:.2f}".replace("-", "\N{MINUS SIGN}")
            shown.append(picture.evaluate("it => getComputedStyle(it).backgroundPosition"))
            page.keyboard.press("ArrowRight")
        box = slider.bounding_box()
        where = box["x"] + box["width"] - 2, box["y"] + box["height"] / 2
        page.touchscreen.tap(*where) if size == "phone" else page.mouse.click(*where)
        assert output.text_content() == f"{values[-1]:.2f}".replace("-", "\N{MINUS SIGN}")
        shown.append(picture.evaluate("it => getComputedStyle(it).backgroundPosition"))
        assert [position.split()[0] for position in shown] == ["0%", "6.25%", "100%"]  # of 17 images in a row
        assert other.evaluate("it => getComputedStyle(it).backgroundPosition") == before
        assert seen.console == []


def test_frames_are_the_traversal(disks, monkeypatch):
    """What a slider shows is the picture of the report folder, and its values are those of `sami-fast traverse`."""
    run = open_run(disks)
    moved = traversals(run, encode(run, run.model))
    values = [list(map(float, row.split())) for row in re.findall('data-values="([^"]*)"', Page(disks).html)]
    assert values == [pytest.approx(each.values, rel=1e-3) for each in moved]
    monkeypatch.setattr("sami_fast.latents.sampling.RANGE_IMAGES", 10)
    moved = traversals(run, encode(run, run.model))
    output = disks.parent / "traversed.npz"
    assert main(["traverse", str(disks), "--steps", "2", "--output", str(output)]) == 0
    with np.load(output) as written:
        assert written["axes"].tolist() == [each.axis for each in moved]
        assert written["values"] == pytest.approx(np.array([each.values[::2] for each in moved]))


@pytest.mark.parametrize("size", SIZES)
def test_thumbnails_enlarge_and_the_map_takes_other_latents(photos, size):
    with open_page(size) as (page, seen):
        page.goto(address(photos))
        lens, thumbs = page.locator("#lens"), page.locator(".map .thumb")
        assert lens.is_hidden()
        for thumb in (thumbs.last, page.locator(".ends .thumb").first):
            thumb.scroll_into_view_if_needed()
            small = thumb.locator(".picture").bounding_box()["width"]
            thumb.dispatch_event("click") if size == "desktop" else thumb.tap(force=True)
            assert lens.locator(".picture").bounding_box()["width"] > 2 * small
            assert lens.locator("figcaption").text_content().startswith(thumb.get_attribute("data-caption"))
            assert HOSTILE in lens.text_content()
            page.keyboard.press("Escape")
            assert lens.is_hidden()
        data = json.loads(page.locator(".gallery script").text_content())
        across = page.locator(".gallery select").first
        for row in (1, 2):
            across.select_option(str(row))
            left = [float(place.removesuffix("%")) for place in thumbs.evaluate_all("all => all.map(it => it.style.left)")]
            assert np.corrcoef(left, data["positions"][row])[0, 1] == pytest.approx(1.0, abs=1e-6)
        thumbs.first.focus()
        page.keyboard.press("ArrowRight")
        order = np.argsort(data["positions"][2], kind="stable").tolist()
        focused = thumbs.evaluate_all("all => all.indexOf(document.activeElement)")
        assert focused == order[min(order.index(0) + 1, len(order) - 1)]
        assert seen.console == []


def test_hostile_names_are_text(photos):
    assert known_factors(open_run(photos))[1] == (HOSTILE,)
    with open_page("phone") as (page, seen):
        page.goto(address(photos))
        assert overflow(page) <= 0
        assert page.locator(".card", has_text="z1").locator("h3").text_content() == f"{HOSTILE} z1"
        assert page.locator(".card .facts b").first.text_content() == HOSTILE
        assert page.locator("img[src=x]").count() == 0
        assert (seen.console, seen.requests) == ([], [address(photos)])


def test_without_scripts_the_page_shows_strips(disks):
    with open_page("phone", scripts=False) as (page, _):
        page.goto(address(disks))
        assert page.locator(".card .strip li:visible").count() == 9 * LATENTS
        assert page.locator(":is(.player, .choose, .moving, .command button):visible").count() == 0
        assert page.locator(".map .thumb:visible").count() == 96


def test_on_paper_everything_is_unfolded(disks):
    with open_page() as (page, _):
        page.goto(address(disks))
        assert page.locator("#bound-part table").is_hidden()
        page.emulate_media(media="print")
        assert page.locator(".card .strip li").first.is_visible()
        assert page.locator(".player").first.is_hidden()
        assert page.locator("#bound-part table").bounding_box()["height"] > 0


def test_a_command_is_copied(disks):
    with open_page() as (page, _):
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.goto(address(disks))
        command = page.locator(".command").first
        command.locator("button").click()
        assert command.locator("button").text_content() == "Copied"
        assert page.evaluate("navigator.clipboard.readText()") == command.locator("pre").text_content()


def test_a_page_that_is_not_silent_would_be_noticed(tmp_path):
    """Nor does another script run than the report's own, or a picture come from elsewhere."""
    page_file, script = tmp_path / "page.html", '<script>console.error("a complaint")</script><img src="http://127.0.0.1:9/x.png">'
    guarded = TEMPLATES.get_template("base.html").render(views=[]).replace("<main>", "<main>" + script)
    for content, complaint, times in ((script, "a complaint", 1), (guarded, "Content Security Policy", 2)):
        page_file.write_text(content)
        with open_page() as (page, seen):
            page.goto(page_file.as_uri())
            page.wait_for_timeout(200)
            assert sum(complaint in said for said in seen.console) == times, seen.console
            assert "http://127.0.0.1:9/x.png" in seen.requests  # asked for, if not allowed


# Runs side by side


def test_runs_side_by_side(disks, collapsed, tmp_path, capsys):
    output = tmp_path / "compare.html"
    assert main(["report", str(disks), str(collapsed), "--output", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    scores = [scores_of(run) for run in (disks, collapsed)]
    with open_page() as (page, seen):
        page.goto(output.as_uri())
        assert page.locator("h1").all_text_contents() == ["SAMI run “disks”", "SAMI run “collapsed”"]
        assert all(each["health"]["reason"][1:] in page.locator("main").text_content() for each in scores)
        row = page.locator("tr", has_text="MCC, rank correlation").locator("td").all_text_contents()
        assert row[:2] == [f"{each['mcc']:.3f}" for each in scores]
        assert row[2] == f"{scores[0]['pca']['mcc']:.3f}"
        assert page.locator(".card").count() == LATENTS
        left, right = (page.locator(".side").first.locator("> div").nth(place).bounding_box() for place in (0, 1))
        assert left["y"] == right["y"]
        assert left["x"] + left["width"] <= right["x"]
        assert (seen.console, seen.requests) == ([], [output.as_uri()])
    with open_page("phone") as (page, _):
        page.goto(output.as_uri())
        assert overflow(page) <= 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{0}", "{1}"], "--output: expected for several runs"),
        (["{0}", "--output", "x.html"], "--output: expected for several runs"),
        (["{0}", "{0}", "--output", "x.html"], "expected each run once"),
        (["{0}", "{1}", "--output", "x.png"], "expected a name ending in .html"),
        (["{0}", "--axes", "nowhere.npz"], "nowhere.npz: no such file of axes"),
        (["{0}", "--axes", "{0}/../two.npz"], "two.npz: expected axes of 3 latent dimensions, found 2"),
    ],
)
def test_what_report_refuses(disks, collapsed, capsys, arguments, sentence):
    Axes.of_latents(2).save(disks.parent / "two.npz")
    assert main(["report", *(each.format(disks, collapsed) for each in arguments)]) == 2
    assert sentence in capsys.readouterr().err


# Where the numbers of a run are watched, its pictures are too


def test_pictures_in_tensorboard(collapsed):
    show_report(collapsed)
    watched = EventAccumulator(str(collapsed / "tensorboard")).Reload()
    assert sorted(watched.Tags()["images"]) == ["report/reconstructions", "report/samples"]
    (event,) = watched.Images("report/samples")
    shown = Image.open(io.BytesIO(event.encoded_image_string))
    assert np.array_equal(shown, Image.open(collapsed / "report" / "samples.png").convert("RGB"))
    assert event.step == 30


def test_pictures_in_wandb(collapsed, tmp_path, monkeypatch):
    """Of a stand-in for the package, which needs an account: what it is given, and in which order."""
    lines = ["calls = []", "init = lambda **settings: calls.append(settings)", "log = calls.append", "finish = lambda: log('end')"]
    (tmp_path / "wandb.py").write_text("\n".join([*lines, "Image = str"]))
    monkeypatch.syspath_prepend(tmp_path)
    folder = make_run(tmp_path / "run", "log.wandb=true", "log.tensorboard=false")
    shutil.copytree(collapsed / "report", folder / "report")
    show_report(folder)
    from wandb import calls  # pyrefly: ignore[missing-import]

    files = [{f"report/{name}": str(folder / "report" / f"{name}.png")} for name in ("reconstructions", "samples")]
    assert calls == [{"project": "sami-fast", "group": "run"}, *files, "end"]
    assert not (folder / "tensorboard").exists()
    (tmp_path / "wandb.py").write_text(r"def init(**settings): raise RuntimeError('no\nkey')")
    monkeypatch.delitem(sys.modules, "wandb")
    with pytest.raises(UserError, match=r"its report is written, but its pictures cannot be shown in TensorBoard or W&B \(no key\)"):
        show_report(folder)


# What the first screen and the cards are made of


AS_PHOTOS = ["kl_weight.kind=auto", "kl_weight.start=0.03", "kl_weight.low=0.015", "train.turn=[0.6]"]
CONTROLLED = ["method=beta_vae", "kl_weight.kind=controller", "kl_weight.target=5", "kl_weight.start=0.01", "kl_weight.low=0.01"]


@pytest.mark.parametrize(
    ("word", "live", "settings", "expected"),
    [
        ("healthy", 3, [], []),
        ("collapsed", 0, [], ["kl_weight.kind=auto", "train.mode=staged"]),
        ("collapsed", 0, ["kl_weight.kind=auto"], ["kl_weight.start=0.0625", "kl_weight.low=0.00025"]),
        ("collapsed", 0, AS_PHOTOS, ["kl_weight.start=0.0075", "kl_weight.low=0.00375"]),
        ("collapsed", 0, CONTROLLED, ["kl_weight.start=0.0025", "kl_weight.low=0.0025"]),
        ("undertrained", 3, [], ["train.steps=60"]),
        ("undertrained", 3, ["train.minutes=10"], ["train.minutes=20"]),
        ("redundant", 2, [], ["train.turn=[0.6]"]),
        ("redundant", 2, ["train.turn=[0.6]"], ["encoder.latent_size=2"]),
        ("redundant", 3, AS_PHOTOS, ["kl_weight.low=0.03"]),
        ("redundant", 3, ["train.turn=[0.6]"], ["kl_weight.end=0.16"]),
        ("tilted", 3, [], ["train.turn=[0.6]"]),
        ("tilted", 3, ["train.turn=[0.5]"], []),
        ("tilted", 3, ["train.turn=[0.5]", "kl_weight.kind=auto"], ["kl_weight.fall=0.5"]),
        ("repairing the denoiser", 3, ["train.mode=staged"], ["denoiser.skip_logsnr=-5", "train.denoiser_steps=3000"]),
        ("repairing the denoiser", 3, ["train.mode=staged", "denoiser.skip_logsnr=-4"], ["train.denoiser_steps=3000"]),
        ("overlooking", 3, [], ["encoder.style=silu", "encoder.smooth=0.5", "sami.logsnr_max=auto"]),
        ("overlooking", 3, ["encoder.style=silu", "sami.logsnr_max=0"], ["encoder.smooth=0.5"]),
        ("overlooking", 3, ["encoder.style=silu", "encoder.smooth=0.5", "sami.logsnr_max=0"], ["train.steps=60"]),
        ("overlooking", 3, ["method=beta_vae", "encoder.style=silu"], ["encoder.smooth=0.5"]),
    ],
)
def test_what_mends_a_run_is_a_setting(tmp_path, word, live, settings, expected):
    folder = make_run(tmp_path / "run", *settings)
    assert mended(open_run(folder).config, word, live) == expected
    load_config(str(folder / "config.yaml"), expected)


def test_extremes():
    low, high = extremes(np.array([3.0, -1.0, 2.0, 5.0, 2.0]), 2)
    assert (low.tolist(), high.tolist()) == ([1, 2], [0, 3])
    assert [part.tolist() for part in extremes(np.array([1.0, 0.0, 2.0]), 9)] == [[1], [2]]  # no image stands at both ends
    with pytest.raises(ValueError, match="finite"):
        extremes(np.array([1.0, np.nan]), 1)


def test_cards_show_the_images_at_the_ends(array):
    run = open_run(array)
    latents = encode(run, run.model)
    page = Page(array)
    ends = [tag["data-caption"] for name, tag in page.tags if tag.get("class") == "thumb" and "style" not in tag]
    for rank, dim in enumerate(latents.live[:12]):
        low, high = extremes(latents.mu[:, dim], 6)
        shown = ends[12 * rank : 12 * rank + 12]
        assert [text.partition(",")[0] for text in shown] == [f"#{run.chosen[place]}" for place in (*low, *high)]
        assert shown[-1].endswith(f"z{dim} {latents.mu[high[-1], dim]:.2f}".replace("-", "\N{MINUS SIGN}"))


def test_captions_are_text_whatever_the_file_is_called(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in (b"\xff.png", b"\x1b[31m.png"):
        Image.new("L", (8, 8)).save(tmp_path / "photos" / os.fsdecode(name))
    data = [f"data.path={tmp_path / 'photos'}", f"data.cache_dir={tmp_path / 'cache'}", "data.channels=1", "data.holdout=0"]
    run = open_run(make_run(tmp_path / "run", "data.kind=image_folder", *data))
    assert {*captions(run, range(2))} == {"\\udcff.png", "\\x1b[31m.png"}


def test_a_map_of_one_latent_is_a_line():
    gallery = Gallery(Sheet("", 20, 1, 8, 8), ["a", "b", "c"], [2], np.array([[0.0], [1.0], [4.0]]))
    drawn = part("map", view=SimpleNamespace(prefix="", gallery=gallery, cards=[]))
    assert "The images lie along one line, as one latent is live: to the right its mean, z2, grows." in drawn
    assert "<select" not in drawn
    assert re.findall("left:(.*?)%;bottom:(.*?)%", drawn) == [("4.0", "50.0"), ("27.0", "50.0"), ("96.0", "50.0")]


def test_hundreds_of_dead_latents_are_one_picture(disks):
    run = open_run(disks)
    latents = encode(run, run.model)
    many = {name: [0.01] * 400 for name in ("kl_per_dim", "information_per_dim")}
    drawn = svg(training_curves(replace(run, log=[row | many for row in run.log]), latents))
    assert drawn.count("<path") < 150
    assert drawn.count("<image") == 1


def test_scores_of_older_code_are_measured_again(disks, tmp_path):
    shutil.copytree(disks, tmp_path / "disks")
    run, scores = replace(open_run(disks), folder=tmp_path / "disks"), scores_of(disks)
    assert _kept_scores(run) == scores
    for older in ({"pca": None}, {"health": "healthy"}, {"health": None}):
        (tmp_path / "disks/report/metrics.json").write_text(json.dumps(scores | older))
        assert _kept_scores(run) is None


def test_threads_bound_the_processes_that_score(collapsed, monkeypatch):
    asked = {}
    monkeypatch.setattr("sami_fast.report.write_report", lambda folder, **options: asked.update(options))
    for options, jobs in ((["--threads", "1"], 1), ([], None)):
        assert main(["report", str(collapsed), *options]) == 0
        assert asked["jobs"] == jobs


def test_names_of_latents():
    directions = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, -3.0]])
    axes = Axes(("size", "mixed", "side"), directions, np.linalg.inv(directions).T, np.zeros(3))
    assert latent_names(axes, 3) == {0: "size", 2: "side"}
    assert latent_names(axes, 4) == latent_names(None, 3) == latent_names(Axes.of_latents(3), 3) == {}


def test_sheets_hold_their_images():
    levels = torch.randint(0, 256, (5, 3, 4, 6), generator=torch.Generator().manual_seed(0))
    made = sheet(levels / 127.5 - 1.0, 2, 64)
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(made.source.partition(",")[2]))))
    column, row = made.place(4)
    assert (made.columns, made.rows, column, row) == (2, 3, 0, 2)
    assert np.array_equal(drawn[row * 4 : row * 4 + 4, column * 6 : column * 6 + 6], levels[4].permute(1, 2, 0))
    noise = torch.rand(300, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1  # which no photograph is
    assert len(sheet(noise, 20, 64).source) < 1.4 * MOST_BYTES


def test_charts_follow_the_paper():
    """Every ink of a chart is one of those that change with the reader's scheme, and names are no mathematics."""
    generator = np.random.default_rng(0)
    drawn = svg(correlations(latents_of(generator.normal(size=(50, 2))), np.eye(2), [literal("$x"), literal("y$_")]))
    assert INK.lower() not in drawn.partition("</style>")[2].lower()
    assert f":root{{--c0:{DARK[COLOURS[0]]}" in drawn
    assert "figure.facecolor" not in drawn
    assert "$x" in drawn


# What a user is told


def test_not_a_run_folder(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model", "has no model/ yet"),
        ("metrics.jsonl", r"metrics\.jsonl: not found"),
        ("environment.json", r"environment\.json: not found"),
        ("config.yaml", "not a run folder"),
    ],
)
def test_missing_pieces(tmp_path, missing, message):
    folder = make_run(tmp_path / "run")
    if (folder / missing).is_dir():
        shutil.rmtree(folder / missing)
    else:
        (folder / missing).unlink()
    with pytest.raises(UserError, match=message):
        write_report(folder)
    assert not (folder / "report").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", '{"step": 1, "validation_nats": 3.0}\n', "holds no step of training"),
        ("metrics.jsonl", "", "holds no step of training"),
        ("environment.json", "{", "not what training writes there"),
        ("model/model.safetensors", "short", "damaged"),
    ],
)
def test_damaged_pieces(tmp_path, file, content, message):
    folder = make_run(tmp_path / "run")
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=message):
        write_report(folder)


def test_odd_rows_of_the_log_are_passed_over(tmp_path):
    """Rows that training does not write, between those that it wrote; one of a hundred thousand dimensions takes no minute either."""
    folder = make_run(tmp_path / "run")
    log = folder / "metrics.jsonl"
    expected = open_run(folder).log
    row, lines = expected[-1], log.read_text().splitlines()
    odd = [
        {"step": "9"},
        {"step": [9]},
        {"step": True},
        {"step": 10**400},
        {"loss_nats": None},
        {"loss_nats": math.nan},
        {"loss_nats": 10**400},
        {"kl_nats": {}},
        {"kl_weight": "low"},
        {"seconds": [[1.0]]},
        {"images_per_second": math.inf},
        {"diffusion_nats": "x"},
        {"kl_per_dim": 1.0},
        {"kl_per_dim": [0.0] * 100_000},
        {"kl_per_dim": ["a"] * len(row["kl_per_dim"])},
        {"information_per_dim": [None] * len(row["kl_per_dim"])},
        {"information_sum_nats": "much"},
    ]
    texts = [json.dumps(row | change) for change in odd]
    texts += [json.dumps(row | {"step": 10**15}), "[" * 100_000, "[]", "null", "1" * 10_000, "\u2028"]
    log.write_text("\n".join([*texts, *lines, json.dumps(row | {"step": row["step"] - 1}), *texts]))
    assert open_run(folder).log == expected
    log.unlink()
    os.mkfifo(log)
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be read \(.*not a regular file"):
        open_run(folder)


@pytest.mark.parametrize("command", [5, "train.py", {"a": 1}, [None, 5]])
def test_the_command_of_a_strange_environment(command):
    assert isinstance(command_line({"command": command}), str)


@pytest.mark.parametrize("network", ["encoder", "denoiser"])
def test_a_model_that_diverged_is_not_scored(tmp_path, network):
    """Its weights are finite, what comes out is not."""
    folder = make_run(tmp_path / "run")
    model = load_model(folder)
    with torch.no_grad():
        for parameter in model.networks[network].parameters():
            parameter.fill_(3e38)
    model.save_pretrained(folder / "model")
    with pytest.raises(UserError, match=r"run: its (latents|model) cannot be scored \(.*: expected finite"):
        write_report(folder)


def test_data_of_another_shape(tmp_path):
    folder = make_run(tmp_path / "run")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("image_size: 8", "image_size: 16"))
    with pytest.raises(UserError, match=r"trained on images of shape \[1, 8, 8\].* now \[1, 16, 16\]"):
        write_report(folder)


def test_report_that_cannot_be_written(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "report").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot write the report"):
        write_report(folder)
