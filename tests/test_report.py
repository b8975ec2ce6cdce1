"""The report of small runs: what metrics.json holds, what the page is made of, what a user is told when it cannot be written."""

import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import log_rows
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from sami_fast.cli import parser
from sami_fast.config import load_config, to_yaml
from sami_fast.errors import UserError
from sami_fast.evaluation import Latents, encode, known_factors, open_run, profile
from sami_fast.evaluation.latents import untrained
from sami_fast.latents.discovery import discover
from sami_fast.methods.build import build_model
from sami_fast.methods.registry import load_model
from sami_fast.metrics.identifiability import correlation_matrix, mcc
from sami_fast.metrics.straightness import clip_straightness
from sami_fast.report import write_report
from sami_fast.report.charts import COLOURS, MATRIX_ROWS, calibration, correlations, information, line, scatter_fits
from sami_fast.report.discoveries import axis_scores, discoveries
from sami_fast.report.motion import Clips, curvatures, read_clips, trajectories
from sami_fast.report.page import TEMPLATES, command_line
from sami_fast.report.strips import PNG_BYTES, Strip, axis_strips, fitted_latents, png, strips

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
VOID = {"meta", "img"}
RUNS = ("disks", "array", "collapsed", "vae", "diffae")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.text += "\n" if tag == "pre" else ""

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
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


def test_metrics_of_the_untrained_encoder(disks):
    before = scores_of(disks)["untrained"]
    assert set(before) >= {"kl_nats", "kl_per_dim", "active_dims", "mcc", "mig"} | BY_FACTOR
    assert before["kl_nats"] < scores_of(disks)["kl_nats"]


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
        ("disks", {"traversals", "correlations", "latents", "information", "calibration", "guidance", "axes"}),
        ("array", {"traversals", "information", "calibration", "guidance"}),
        ("collapsed", set()),
        ("vae", {"traversals", "correlations", "latents", "information", "calibration", "trajectories", "curvature"}),
        ("diffae", {"traversals", "correlations", "latents"}),
    ],
)
def test_pictures(run, expected, request):
    folder, expected = request.getfixturevalue(run), expected | {"reconstructions", "samples", "training"}
    files = {file.name for file in (folder / "report").iterdir()}
    assert files == {f"{name}.png" for name in expected} | {"index.html", "metrics.json"}  # nothing partial stays
    assert len(Page(folder).images()) == len(expected)


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
    assert drawn.shape[:2] == (24 + 160 + 24, 24 + 300 + 160 + 8 + 160 + 24)
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
    figure = correlations(latents, factors, ("a", "b"))
    drawn = np.asarray(figure.axes[0].images[0].get_array())
    assert drawn == pytest.approx(correlation_matrix(latents.z, factors).T[::-1])
    assert drawn[0, 1] == 1
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["z2", "z1", "z0"]
    assert "1.00" in {text.get_text() for text in figure.axes[0].texts}


def test_correlations_of_many_latents_and_factors():
    """As many as CelebA's attributes: no numbers in the cells, no scatter plots."""
    generator = np.random.default_rng(0)
    latents, names = latents_of(generator.normal(size=(50, 40))), [f"attribute_{number}" for number in range(40)]
    figure = correlations(latents, generator.normal(size=(50, 40)), names)
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
    figure = axis_strips(run, found, latents)
    assert len(figure.images) == 9 * LATENTS
    texts = [text.get_text() for text in figure.texts]
    assert [text.split("\n")[0].split(" · ")[0] for text in texts if text.startswith("scale")] == list(found.names)
    coordinates = (latents.mu - found.center) @ found.readouts[0]
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
    scores = axis_scores({"scale": found}, latents, factors, ("a", "b", "c"))
    assert scores["scale"]["mcc"] == pytest.approx(1.0)
    assert scores["latents"]["mcc"] < 0.9
    assert scores["scale"]["score"] == [None, -1.5, None]
    scores["scale"]["undecided"] = [[0.1, 0.0], [0.8, 0.2], [0.9, 0.8]]
    tables = part("axes", axes=scores, names=("a", "b", "c"))
    assert "1.000" in tables
    assert re.search("below all levels.*-1.5.*above all levels", tables, re.DOTALL)
    assert set(axis_scores({"scale": found}, latents, factors[:, :0], ())) == {"scale", "logsnr_levels"}  # nothing to compare with


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
        assert tag not in {"script", "link", "iframe", "object", "embed", "base"}
        for name in {"src", "href", "srcset", "style"} & attributes.keys():
            if tag == "a":
                assert attributes["href"][0] == "#"
                assert ("section", {"id": attributes["href"][1:]}) in page.tags
            else:
                assert (tag, name) == ("img", "src")
                assert attributes[name].startswith("data:image/png;base64,")
        assert not any(name.startswith("on") for name in attributes)
    assert all(attributes.get("alt", "").strip() for attributes in page.images())
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": POLICY}) in page.tags
    assert "url(" not in page.html
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
    commands = re.findall("^sami-fast (.*)$", Page(folder).text, re.MULTILINE)
    along = {"disks": ["axes", "traverse", "traverse"], "collapsed": []}.get(run, ["traverse"])
    names = ["report", "evaluate", *along, "encode"]
    assert [command.split()[0] for command in commands] == names
    for command in commands:
        arguments = parser().parse_args(shlex.split(command))
        assert arguments.run in (str(folder), [str(folder)])


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
    _, *rows = rows_of(part("scores", scores=numbers | {"untrained": untrained}, names=("x", "y")).partition("The same by factor")[0])
    explained = {name: cells for name, *cells in rows}
    assert [explained[name][0] for name in ("Linear R²", "Nonlinear R²", "DCI completeness", "BetaVAE score")] == [
        "0.800", "0.850", "0.320", "0.360",
    ]  # fmt: skip
    assert "IRS" not in explained
    assert "0.93" in explained["MIG"][-1]
    assert all(words.endswith(".") and len(words) > 20 for *_, words in explained.values())
    assert explained["BetaVAE score"][1] == "\N{EN DASH}"

    attributes = {"kl_nats": 9.0, "active_dims": 3, "tad_nashae": 0.21, "attributes_captured_nashae": 4, "latent_quality": 0.8}
    section = part("scores", scores=attributes | {"untrained": attributes}, names=("smiling", "hat"))
    assert "0.210" in section
    assert "by factor" not in section
    assert "Linear" not in section


def test_page_shows_the_scores(disks):
    page, scores = Page(disks), scores_of(disks)
    for value in (scores["mcc"], scores["untrained"]["mcc"], scores["mig"], scores["linear_r2"]["y"]):
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
    assert ("p", {"class": "alarm"}) in page.tags


def test_report_of_a_single_held_out_image(tmp_path):
    path = save_images(tmp_path, 9)
    folder = make_run(tmp_path / "run", "data.kind=array", f"data.path={path}")
    write_report(folder)
    scores = scores_of(folder)
    assert scores["num_images"] == 1
    assert scores["elbo_standard_error_nats"] is None


def test_report_of_images_that_training_saw(tmp_path):
    folder = make_run(tmp_path / "run", "data.kind=array", f"data.path={save_images(tmp_path, 20)}", "data.holdout=0")
    write_report(folder)
    assert scores_of(folder)["num_images"] == 20
    assert "none are held out" in Page(folder).text


# The page in a browser


def opened(page: Path, scratch: Path) -> tuple[list[str], set[str]]:
    """What a page writes to the console, and the addresses it asks the network for."""
    log = scratch / "net.json"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={scratch / 'profile'}", "--dump-dom"]
    command += ["--enable-logging=stderr", "--v=0", f"--log-net-log={log}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "</html>" in done.stdout
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    # The browser's own requests have no origin.
    asked = {event["url"] for event in events if "url" in event and event.get("initiator", "not an origin") != "not an origin"}
    return re.findall(r":CONSOLE[^\]]*\] (.*)", done.stderr), {url for url in asked if url.split(":")[0] in {"http", "https", "ws", "wss"}}


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("run", ["disks", "vae"])
def test_page_in_a_browser_is_silent_and_asks_for_nothing(run, request, tmp_path):
    assert opened(request.getfixturevalue(run) / "report" / "index.html", tmp_path) == ([], set())


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_page_that_is_not_silent_would_be_noticed(tmp_path):
    address, page = "http://127.0.0.1:9/x.png", tmp_path / "page.html"
    image = f'<img src="{address}">'
    page.write_text(f"<!DOCTYPE html><html><body>{image}<script>console.error('a complaint')</script></body></html>")
    console, asked = opened(page, tmp_path)
    assert any("a complaint" in text for text in console)
    assert asked == {address}

    page.write_text(
        TEMPLATES.from_string(
            f"{{% extends 'page.html' %}}{{% block title %}}a title{{% endblock %}}{{% block main %}}{image}{{% endblock %}}"
        ).render()
    )
    console, asked = opened(page, tmp_path)
    assert any("Content Security Policy" in text for text in console)
    assert asked == set()


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
