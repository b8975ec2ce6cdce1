"""The report of small runs: what metrics.json holds, what the page is made of, what a user is told when it cannot be written."""

import json
import math
import shutil
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from sami_fast.config import Config, load_config, to_yaml
from sami_fast.errors import UserError
from sami_fast.report import write_report
from sami_fast.report.run import open_run
from sami_fast.report.scores import untrained
from sami_fast.report.strips import Strip, strips
from sami_fast.sami import Sami

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


def log_rows(config: Config) -> list[dict]:
    """Rows of the shape that training writes, with a checkpoint's row among them."""
    rows = []
    for step in range(5, config.train.steps + 1, 5):
        joint = step > config.first_joint_step
        kl = [1.5 / 8.0**d if joint else 0.0 for d in range(config.encoder.latent_size)]
        rows.append(
            {
                "step": step,
                "images": step * config.train.batch_size,
                "loss_nats": 50.0 / step,
                "diffusion_nats": 45.0 / step,
                "unguided_nats": 50.0 / step,
                "kl_nats": sum(kl),
                "kl_weight": 0.1 if joint else 0.0,
                "learning_rate": 1e-3,
                "images_per_second": 100.0 + step if joint else 1000.0,
                "seconds": 0.5 * step,
                "kl_per_dim": kl,
            }
        )
    return [*rows, {"step": config.train.steps, "validation_nats": 3.0, "checkpoint": "step_30"}]


def make_run(folder: Path, *overrides: str, kl: str = "informative") -> Path:
    """A run folder as training leaves it, with networks that have not been trained.

    Args:
        kl: "informative" for latents far from the prior, "none" for a collapsed posterior.
    """
    config = load_config(None, [*SMALL, f"runs_dir={folder.parent}", f"name={folder.name}", *overrides])
    images = {"image_channels": 1, "image_size": 8}
    torch.manual_seed(config.seed)
    sami = Sami.build({"encoder": images | asdict(config.encoder), "denoiser": images | asdict(config.denoiser)}, asdict(config.schedule))
    with torch.no_grad():
        encoder = sami.encoder
        if kl == "informative":
            encoder.mu.weight.mul_(20.0)
            encoder.raw_var.bias.fill_(-1.0)
        else:
            for head in (encoder.mu, encoder.raw_var):
                head.weight.zero_()
            encoder.mu.bias.zero_()
    folder.mkdir()
    sami.save_pretrained(folder / "model")
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


def scores_of(folder: Path) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"metrics.json holds {constant}, which is not JSON")

    return json.loads((folder / "report" / "metrics.json").read_text(), parse_constant=refuse)


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

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def images(self) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


# metrics.json


def test_metrics_of_disks(disks):
    scores = scores_of(disks)
    assert set(scores) == NUMBERS | WHOLE | OF_FACTORS | BY_FACTOR | {"kl_per_dim", "elbo_of", "untrained"}
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
    assert scores["active_dims"] == sum(kl > 0.05 for kl in scores["kl_per_dim"]) == LATENTS
    assert scores["mcc"] == pytest.approx(sum(scores["mcc_per_factor"].values()) / 3)
    assert scores["mig"] == pytest.approx(sum(scores["mig_per_factor"].values()) / 3)


def test_metrics_of_the_untrained_encoder(disks):
    before = scores_of(disks)["untrained"]
    assert set(before) == {"kl_nats", "kl_per_dim", "active_dims", "mcc", "mig"} | BY_FACTOR
    assert before["kl_nats"] < scores_of(disks)["kl_nats"]


def test_untrained_is_the_network_before_the_first_step(disks):
    run, state = open_run(disks), torch.random.get_rng_state()
    fresh = untrained(run)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(run.config.seed)
    first = Sami.build(run.model.architecture, asdict(run.config.schedule))
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), first.parameters(), strict=True))


def test_metrics_without_factors(array):
    scores = scores_of(array)
    assert set(scores) == NUMBERS | WHOLE | {"kl_per_dim", "elbo_of", "untrained"}
    assert scores["num_images"] == 12  # all that are held out
    assert scores["elbo_of"] == "8-bit pixels"
    assert scores["bits_per_dim"] > 0
    assert scores["active_dims"] == len(scores["kl_per_dim"]) == 14
    assert set(scores["untrained"]) == {"kl_nats", "kl_per_dim", "active_dims"}


def test_metrics_of_a_collapsed_encoder(collapsed):
    scores = scores_of(collapsed)
    assert scores["active_dims"] == 0
    assert scores["kl_nats"] < 0.05
    assert max(scores["linear_r2"].values()) < 0.5


def test_same_run_same_scores(disks):
    before = (disks / "report" / "metrics.json").read_text()
    write_report(disks)
    assert (disks / "report" / "metrics.json").read_text() == before


# Pictures


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ("disks", {"traversals", "reconstructions", "samples", "latents", "training"}),
        ("array", {"traversals", "reconstructions", "samples", "training"}),
        ("collapsed", {"reconstructions", "samples", "training"}),
    ],
)
def test_pictures(run, expected, request):
    folder = request.getfixturevalue(run)
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


# The page


@pytest.mark.parametrize("run", ["disks", "array", "collapsed"])
def test_page_needs_nothing_else(run, request):
    page = Page(request.getfixturevalue(run))
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base"}
        for name in {"src", "href", "srcset", "style"} & attributes.keys():
            assert (tag, name) == ("img", "src")
            assert attributes[name].startswith("data:image/png;base64,")
        assert not any(name.startswith("on") for name in attributes)
    assert all(attributes.get("alt", "").strip() for attributes in page.images())
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
    assert "Only the 12 most informative are shown" in page.text


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
