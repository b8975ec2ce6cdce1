"""The `sami-fast` command: every subcommand for real on a tiny model, what lands on disk, and what bad input gets to hear."""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.write_video import write_video
from sami_fast.cli import facts, files, main, parser
from sami_fast.cli.options import SOLVERS, STARTS, sampler_arguments
from sami_fast.config import load_config, to_yaml
from sami_fast.latents import sampling
from sami_fast.latents.axes import Axes
from sami_fast.latents.sampling import Solver, Start, encode, reverse_process
from sami_fast.methods.baselines import BetaVAE, DiffAE
from sami_fast.methods.latent_model import Posterior
from sami_fast.methods.registry import load_model
from sami_fast.methods.sami import Sami

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--steps", "3"]
TICKS = 40  # pixels below a row with words under its images


def picture_size(columns: int, below: list[int], labels: bool = True) -> tuple[int, int]:
    """Of a PNG of rows of 8 x 8 images, each enlarged to 160 pixels; `below` is what stands under each row."""
    return 24 + 300 * labels + 168 * columns - 8 + 24, 24 + sum(160 + high + 24 for high in below)


DIRECTIONS = np.array([[1.0, 0.5, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
AXES = Axes(("size", "tilt\x1b[31m"), DIRECTIONS, np.linalg.pinv(DIRECTIONS).T, np.array([0.1, 0.0, 0.0, 0.0]))


def build(latent_size: int = 4, live: int = 2) -> Sami:
    """8x8 images; the first `live` latents follow the image, the others stay at the prior."""
    torch.manual_seed(0)
    image = {"image_channels": 1, "image_size": 8}
    architecture = {
        "encoder": image | {"latent_size": latent_size, "channels": [8, 8]},
        "denoiser": image | {"channels": [4, 8], "embedding_size": 8},
    }
    sami = Sami.build(architecture, {"kind": "uniform_logsnr", "logsnr_min": -7.0, "logsnr_max": 5.0})
    nn.init.normal_(sami.denoiser.out.weight, std=0.1)
    with torch.no_grad():
        sami.encoder.mu.weight[:live].normal_(std=0.5)
        sami.encoder.mu.weight[live:].zero_()
        sami.encoder.mu.bias.zero_()
    return sami.eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with a config and a model."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    build().save_pretrained(folder / "model")
    settings = ["name=tiny", f"runs_dir={folder.parent}", "data.image_size=8", "report.images=30"]
    (folder / "config.yaml").write_text(to_yaml(load_config(None, settings)))
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Files of images, good and bad, and folders that are no runs."""
    folder = tmp_path_factory.mktemp("inputs")
    generator = np.random.default_rng(0)
    good = generator.integers(0, 256, (5, 8, 8), dtype=np.uint8)
    np.save(folder / "good.npy", good)
    np.savez(folder / "two.npz", first=good, second=good[:3])
    np.save(folder / "large.npy", np.zeros((5, 16, 16), np.uint8))
    np.save(folder / "colour.npy", np.zeros((5, 8, 8, 3), np.uint8))
    np.save(folder / "bright.npy", np.full((5, 8, 8), 7.5, np.float32))
    np.save(folder / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    (folder / "text.npy").write_text("not an array")
    (folder / "weights.pt").write_bytes(b"PK")
    (folder / "empty").mkdir()
    (folder / "photos").mkdir()
    Image.fromarray(good[0]).save(folder / "photos/a.png")
    (folder / "broken").mkdir()
    (folder / "broken/a.png").touch()
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "config.yaml").write_text("name: unfinished\n")
    dead = build(live=0)
    dead.save_pretrained(folder / "dead")
    image = {"image_channels": 1, "image_size": 8}
    networks = {"encoder": image | {"latent_size": 4, "channels": [8, 8]}, "decoder": image | {"latent_size": 4, "channels": [8, 8]}}
    networks["denoiser"] = image | {"latent_size": 4, "channels": [4, 8], "embedding_size": 8}
    for kind in (BetaVAE, DiffAE):
        architecture = {name: networks[name] for name in ("encoder", kind.partner)}
        kind.build(architecture, {"kind": "cosine", "logsnr_min": -7.0, "logsnr_max": 5.0}).save_pretrained(folder / kind.method)
    AXES.save(folder / "axes.npz")
    Axes.of_latents(3).save(folder / "three.npz")
    (folder / "damaged").mkdir()
    (folder / "damaged" / "config.json").write_bytes((folder / "dead" / "config.json").read_bytes())
    (folder / "damaged" / "model.safetensors").write_bytes(b"\x00" * 100)
    return folder


def test_encode_a_file(run, inputs, tmp_path, capsys):
    assert main(["encode", str(run), "--data", str(inputs / "good.npy"), "--output", str(tmp_path / "z.npz"), "--batch-size", "2"]) == 0
    written = np.load(tmp_path / "z.npz")
    assert set(written.files) == {"mu", "var"}
    x_0 = torch.from_numpy(np.load(inputs / "good.npy")).float()[:, None] / 127.5 - 1
    expected = encode(Sami.from_pretrained(run), x_0)
    assert np.allclose(written["mu"], expected.mu, atol=1e-5)
    assert np.allclose(written["var"], expected.var, atol=1e-5)
    assert "mu, var of 5 images, 4 latent dimensions" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["z.npz"]


def test_encode_the_runs_own_images(run, tmp_path):
    assert main(["encode", str(run), "--output", str(tmp_path / "z.npz")]) == 0
    written = np.load(tmp_path / "z.npz")
    assert written["mu"].shape == (30, 4)
    assert written["factors"].shape == (30, 3)
    assert written["factor_names"].tolist() == ["x", "y", "background"]
    assert main(["encode", str(run), "--output", str(tmp_path / "few.npz"), "--count", "7"]) == 0
    assert np.allclose(np.load(tmp_path / "few.npz")["mu"], written["mu"][:7], atol=1e-5)


def test_a_saved_model_is_enough_with_data(run, inputs, tmp_path):
    data = ["--data", str(inputs / "two.npz"), "--array-key", "second"]
    assert main(["encode", str(run / "model"), *data, "--output", str(tmp_path / "z.npz")]) == 0
    assert np.load(tmp_path / "z.npz")["mu"].shape == (3, 4)


def test_every_file_of_a_folder_has_its_row(run, tmp_path, capsys, monkeypatch):
    """NaN and the reason where it cannot be read, at once or when its turn comes; nothing else stands in its place."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    photos = tmp_path / "photos"
    photos.mkdir()
    for n in range(5):
        Image.fromarray(np.full((8, 8), 40 * n, np.uint8)).save(photos / f"{n}.png")
    (photos / "1.png").write_bytes(b"")
    whole = (photos / "3.png").read_bytes()
    (photos / "3.png").write_bytes(whole[:50] + bytes(len(whole) - 62) + whole[-12:])  # its header is good, and so is its end
    arguments = ["encode", str(run), "--data", str(photos), "--output", str(tmp_path / "z.npz"), "--batch-size", "2"]
    assert main(arguments) == 0
    written = np.load(tmp_path / "z.npz")
    assert written["files"].tolist() == [f"{n}.png" for n in range(5)]
    assert np.isnan(written["mu"]).all(1).tolist() == np.isnan(written["var"]).any(1).tolist() == [n in (1, 3) for n in range(5)]
    reasons = written["absent"].tolist()
    assert [bool(reason) for reason in reasons] == [n in (1, 3) for n in range(5)]
    assert reasons[1] == "1.png: zero bytes"
    assert reasons[3].startswith("3.png: ")
    grey = torch.full((1, 1, 8, 8), 160 / 127.5 - 1)
    assert np.allclose(written["mu"][4], encode(Sami.from_pretrained(run), grey).mu[0], atol=1e-5)
    assert "of 5 images, 4 latent dimensions; 2 cannot be read: their rows are NaN, and absent says why" in capsys.readouterr().out
    start = ["traverse", str(run), "--data", str(photos), "--output", str(tmp_path / "x.npz"), "--axis", "0", *QUICK, "--image"]
    for image in (1, 3):
        assert main([*start, str(image)]) == 2
        assert f"cannot read {photos}/{image}.png: " in capsys.readouterr().err
    assert main([*start, "5"]) == 2
    assert "--image: expected 0 to 4, found 5" in capsys.readouterr().err
    assert main([*start, "4"]) == 0


def test_factors_of_a_file_that_cannot_be_read_are_absent():
    arrays = {"files": ["a.png", "c.png"], "mu": np.ones((2, 1)), "factors": np.array([[1.0], [2.0]]), "factor_names": ["size"]}
    assert facts._with_rows_of({"b.png": "zero bytes"}, arrays, ["", ""]) == ["", "b.png: zero bytes", ""]
    assert arrays["files"] == ["a.png", "b.png", "c.png"]
    assert np.array_equal(arrays["factors"], [[1.0], [np.nan], [2.0]], equal_nan=True)


def test_frames_are_encoded_in_the_order_of_time(tmp_path, monkeypatch):
    pytest.importorskip("av", reason="needs PyAV: pip install 'sami-fast[feed]'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, clips = tmp_path / "videos", tmp_path / "clips"
    clips.mkdir()
    for name, level in (("b", 20), ("a", 120)):
        frames = np.stack([np.full((16, 16, 3), level + 5 * n, np.uint8) for n in range(12)])
        write_video(clips / f"{name}.avi", frames, codec="mjpeg", keyframe_interval=1)
    build().save_pretrained(folder / "model")
    settings = ["data.kind=video_folder", f"data.path={clips}", "data.image_size=8", "data.channels=1"]
    (folder / "config.yaml").write_text(to_yaml(load_config(None, settings)))
    arguments = ["encode", str(folder), "--data", str(clips), "--output"]
    assert main([*arguments, str(tmp_path / "z.npz")]) == 0
    written = np.load(tmp_path / "z.npz")
    assert written["files"].tolist() == ["a.avi"] * 12 + ["b.avi"] * 12
    assert written["frames"].tolist() == [*range(12)] * 2
    model = Sami.from_pretrained(folder)
    levels = torch.tensor([120.0 + 5 * n for n in range(12)] + [20.0 + 5 * n for n in range(12)]) / 127.5 - 1
    expected = encode(model, levels.view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()).mu
    assert np.abs(written["mu"] - expected.numpy()).max() < 0.2 * np.ptp(expected.numpy(), axis=0).max()
    assert main([*arguments, str(tmp_path / "few.npz"), "--count", "3"]) == 0
    assert np.load(tmp_path / "few.npz")["frames"].tolist() == [0, 1, 2]
    picked = ["edit", str(folder), "--data", str(clips), "--axis", "0", "--amount", "0", "--image", "13", *QUICK]
    assert main([*picked, "--output", str(tmp_path / "x.npz")]) == 0
    assert np.abs((np.load(tmp_path / "x.npz")["images"] + 1) * 127.5 - 25).max() < 4  # row 13: the second frame of b


def test_the_range_of_floats(run, tmp_path, caplog):
    unit = np.random.default_rng(0).random((3, 8, 8), dtype=np.float32)
    np.save(tmp_path / "unit.npy", unit)
    arguments = ["encode", str(run), "--data", str(tmp_path / "unit.npy"), "--output"]
    assert main([*arguments, str(tmp_path / "auto.npz")]) == 0
    assert "unit.npy: all values lie in [0, 1], and are taken for values in [-1, 1]" in caplog.text
    assert main([*arguments, str(tmp_path / "unit.npz"), "--range", "unit"]) == 0
    for name, x_0 in (("auto", unit), ("unit", unit * 2 - 1)):
        expected = encode(Sami.from_pretrained(run), torch.from_numpy(x_0)[:, None]).mu
        assert np.allclose(np.load(tmp_path / f"{name}.npz")["mu"], expected, atol=1e-5)


@pytest.mark.parametrize("source", ["prior", "posterior", "none"])
def test_sample(run, tmp_path, source):
    arguments = ["sample", str(run), "--count", "5", "--seed", "3", "--source", source, *QUICK]
    assert main([*arguments, "--output", str(tmp_path / "a.npz"), "--batch-size", "2"]) == 0
    assert main([*arguments, "--output", str(tmp_path / "b.npz")]) == 0
    first, second = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    assert first["images"].shape == (5, 1, 8, 8)
    assert ("z" in first.files) == (source != "none")
    assert np.allclose(first["images"], second["images"], atol=1e-4)
    assert main([*arguments, "--output", str(tmp_path / "a.png")]) == 0
    assert Image.open(tmp_path / "a.png").size == picture_size(3, [TICKS, TICKS], labels=False)


def test_samples_can_be_encoded_again(run, tmp_path):
    assert main(["sample", str(run), "--count", "2", *QUICK, "--output", str(tmp_path / "x.npz")]) == 0
    assert main(["encode", str(run), "--data", str(tmp_path / "x.npz"), "--output", str(tmp_path / "z.npz")]) == 0
    assert np.load(tmp_path / "z.npz")["mu"].shape == (2, 4)


def test_reconstruct(run, inputs, tmp_path, capsys):
    assert main(["reconstruct", str(run), "--count", "14", *QUICK, "--output", str(tmp_path / "r.png")]) == 0
    assert Image.open(tmp_path / "r.png").size == picture_size(12, 2 * [TICKS, 0])  # 12 pairs, and 2 below
    assert "14 images and their reconstructions, mean squared error" in capsys.readouterr().out
    data = ["--data", str(inputs / "good.npy")]
    assert main(["reconstruct", str(run), *data, *QUICK, "--output", str(tmp_path / "r.npz")]) == 0
    written = np.load(tmp_path / "r.npz")
    assert np.allclose(written["images"][:, 0], np.load(inputs / "good.npy") / 127.5 - 1, atol=1e-6)
    assert written["reconstructions"].shape == (5, 1, 8, 8)


def test_traverse_live_axes(run, inputs, tmp_path, capsys):
    assert main(["traverse", str(run), "--values", "3", *QUICK, "--output", str(tmp_path / "t.npz")]) == 0
    written = np.load(tmp_path / "t.npz")
    assert sorted(written["axes"].tolist()) == [0, 1]
    assert written["images"].shape == (2, 3, 1, 8, 8)
    assert (np.diff(written["values"]) > 0).all()
    printed = capsys.readouterr().out
    assert "row 1: axis" in printed
    assert "images, as in the report\n" in printed
    data = ["--data", str(inputs / "good.npy"), "--axis", "0"]
    assert main(["traverse", str(run), *data, *QUICK, "--output", str(tmp_path / "u.npz")]) == 0
    assert "over 5 images\n" in capsys.readouterr().out


def test_traverse_named_axes(run, tmp_path):
    arguments = ["traverse", str(run), "--axis", "3", "0", "2", "--image", "5", "--guidance-clip", "off", "--eta", "0", *QUICK]
    assert main([*arguments, "--output", str(tmp_path / "t.png")]) == 0
    assert Image.open(tmp_path / "t.png").size == picture_size(9, 3 * [TICKS])


def test_encode_along_axes(run, inputs, tmp_path):
    arguments = ["encode", str(run), "--axes", str(inputs / "axes.npz"), "--output", str(tmp_path / "z.npz")]
    assert main(arguments) == 0
    written = np.load(tmp_path / "z.npz")
    assert written["axis_names"].tolist() == list(AXES.names)
    np.testing.assert_allclose(written["axes"], (written["mu"] - AXES.center) @ AXES.readouts.T, atol=1e-6)


def test_traverse_saved_axes(run, inputs, tmp_path, capsys):
    arguments = ["traverse", str(run), "--axes", str(inputs / "axes.npz"), "--values", "3", *QUICK, "--output", str(tmp_path / "t.npz")]
    assert main(arguments) == 0
    written = np.load(tmp_path / "t.npz")
    assert written["axes"].tolist() == [0, 1]
    assert written["images"].shape == (2, 3, 1, 8, 8)
    assert r"row 1: axis 1 (tilt\x1b[31m), from" in capsys.readouterr().out
    shared = ["--axes", str(inputs / "axes.npz"), "--count", "30"]  # as many as the traversal takes its range from
    assert main(["encode", str(run), *shared, "--output", str(tmp_path / "z.npz")]) == 0
    encoded = {name: torch.from_numpy(values) for name, values in np.load(tmp_path / "z.npz").items() if name in ("mu", "var")}
    z = Posterior(**encoded).draw(torch.arange(30), load_config(str(run / "config.yaml")).seed)
    low, high = np.quantile(AXES.coordinates(z.numpy()), [0.025, 0.975], axis=0)
    np.testing.assert_allclose(written["values"][:, [0, -1]], np.stack((low, high), 1), rtol=1e-4)


def test_solvers_and_starts(run, tmp_path):
    def reconstructed(*options: str) -> np.ndarray:
        output = ["--output", str(tmp_path / "r.npz"), "--overwrite"]
        assert main(["reconstruct", str(run), "--count", "3", "--steps", "20", *options, *output]) == 0
        return np.load(tmp_path / "r.npz")["reconstructions"]

    default = reconstructed()
    assert np.array_equal(default, reconstructed("--solver", "ddim", "--x-T", "random", "--eta", "2"))
    assert np.array_equal(reconstructed("--solver", "ancestral"), reconstructed("--eta", "1"))
    assert not np.allclose(reconstructed("--solver", "dpm2m"), default, atol=0.01)
    inverted = reconstructed("--x-T", "inverted", "--seed", "1")
    assert np.array_equal(inverted, reconstructed("--x-T", "inverted", "--eta", "0", "--seed", "2"))
    assert not np.allclose(inverted, default, atol=0.01)


def test_interpolate(run, inputs, tmp_path, capsys):
    arguments = ["interpolate", str(run), "--image", "1", "4", "--count", "3", "--data", str(inputs / "good.npy"), *QUICK]
    assert main([*arguments, "--output", str(tmp_path / "i.npz"), "--batch-size", "2"]) == 0
    assert "image 1, 3 pictures on the way, image 4" in capsys.readouterr().out
    written = np.load(tmp_path / "i.npz")
    assert written["images"].shape == (3, 1, 8, 8)
    assert np.allclose(written["ends"][:, 0], np.load(inputs / "good.npy")[[1, 4]] / 127.5 - 1, atol=1e-6)
    assert main([*arguments, "--x-T", "random", "--output", str(tmp_path / "i.png")]) == 0
    assert Image.open(tmp_path / "i.png").size == picture_size(5, [TICKS], labels=False)


def test_edit(run, inputs, tmp_path, capsys):
    arguments = ["edit", str(run), "--axis", "1", "--amount", "-0.5", "0", "2", "--image", "3", "0", *QUICK]
    assert main([*arguments, "--output", str(tmp_path / "e.npz")]) == 0
    assert "2 image(s), each followed by its edits along axis 1: -0.5, +0, +2" in capsys.readouterr().out
    written = np.load(tmp_path / "e.npz")
    assert written["edits"].shape == (2, 3, 1, 8, 8)
    assert written["amounts"].tolist() == [-0.5, 0.0, 2.0]
    assert main(["reconstruct", str(run), "--x-T", "inverted", *QUICK, "--output", str(tmp_path / "r.npz")]) == 0
    assert np.allclose(written["edits"][:, 1], np.load(tmp_path / "r.npz")["reconstructions"][[3, 0]], atol=1e-4)
    assert main([*arguments, "--axes", str(inputs / "axes.npz"), "--output", str(tmp_path / "e.png")]) == 0
    assert Image.open(tmp_path / "e.png").size == picture_size(4, 2 * [TICKS])
    assert r"along axis 1 (tilt\x1b[31m)" in capsys.readouterr().out


def test_models_of_other_methods(inputs, tmp_path):
    data = ["--data", str(inputs / "good.npy")]
    for method in ("beta_vae", "diffae"):
        assert main(["encode", str(inputs / method), *data, "--output", str(tmp_path / f"{method}.npz")]) == 0
    assert main(["reconstruct", str(inputs / "diffae"), *data, *QUICK, "--x-T", "inverted", "--output", str(tmp_path / "r.npz")]) == 0
    assert main(["traverse", str(inputs / "diffae"), *data, *QUICK, "--output", str(tmp_path / "t.npz")]) == 0
    assert np.load(tmp_path / "t.npz")["axes"].tolist() == [0, 1, 2, 3]  # no KL says which of them are live
    assert main(["reconstruct", str(inputs / "beta_vae"), *data, "--output", str(tmp_path / "v.npz")]) == 0
    model = load_model(inputs / "beta_vae")
    x_0 = torch.from_numpy(np.load(tmp_path / "v.npz")["images"])
    with torch.no_grad():
        decoded = model.decode(model.encode(x_0).mu).clamp(-1, 1)
    assert np.allclose(np.load(tmp_path / "v.npz")["reconstructions"], decoded, atol=1e-5)


def test_env(capsys):
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text
    assert "attention" in text
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["python"]


def test_a_contact_sheet_is_a_random_sample_with_names(tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(60):
        Image.fromarray(np.full((8, 8, 3), 4 * number, np.uint8)).save(photos / f"{number:02}$.png")
    settings = [f"data.path={photos}", "data.image_size=8", "data.holdout=0", f"data.cache_dir={tmp_path}/cache", "seed=3"]
    sheet = tmp_path / "sheet.png"
    assert main(["data", "images", *settings, "--count", "4", "--seconds", "0", "--output", str(sheet)]) == 0
    assert "4 images of training, a random sample" in capsys.readouterr().out
    drawn = np.asarray(Image.open(sheet).convert("L")).astype(int)
    shown = [drawn[24 + 80 + 224 * (n // 2), 24 + 80 + 168 * (n % 2)] / 4 for n in range(4)]
    expected = torch.randperm(60, generator=torch.Generator().manual_seed(3))[:4]
    assert shown == pytest.approx(expected.tolist(), abs=0.5)
    assert (drawn[24 + 160 + 4 : 24 + 160 + TICKS - 4, 24:184] < 128).any()  # its name


def test_report_prints_where_it_lies(run, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("sami_fast.report.write_report", lambda folder, **options: asked.append(folder) or folder / "report" / "index.html")
    assert main(["report", str(run)]) == 0
    assert asked == [run]
    assert capsys.readouterr().out.strip() == str(run / "report" / "index.html")


def test_overwrite(run, tmp_path):
    output = tmp_path / "s.png"
    output.write_text("old")
    assert main(["sample", str(run), "--count", "1", *QUICK, "--output", str(output)]) == 2
    assert output.read_text() == "old"
    assert main(["sample", str(run), "--count", "1", *QUICK, "--output", str(output), "--overwrite"]) == 0
    assert Image.open(output).size == picture_size(1, [TICKS], labels=False)


@pytest.mark.parametrize(("error", "status"), [(OSError(28, "No space left on device"), 2), (KeyboardInterrupt(), 130)])
def test_a_failed_write_leaves_the_old_file(run, tmp_path, monkeypatch, capsys, error, status):
    output = tmp_path / "s.png"
    output.write_text("old")

    def fail(stream):
        stream.write(b"half")
        raise error

    monkeypatch.setattr(files, "write_bytes", lambda path, content: files._write(path, fail))
    arguments = ["sample", str(run), "--count", "1", *QUICK, "--output", str(output), "--overwrite"]
    assert main(arguments) == status
    assert ("No space left on device" if status == 2 else "interrupted") in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["s.png"]
    assert output.read_text() == "old"


def test_help_and_defaults_agree_with_the_sampler():
    arguments = parser().parse_args(["sample", "run", "--output", "x.png"])
    assert (get_args(Solver), get_args(Start)) == (SOLVERS, STARTS)
    defaults = {name: parameter.default for name, parameter in inspect.signature(reverse_process).parameters.items()}
    options = sampler_arguments(arguments)
    assert len(options) == 6
    assert options == {name: defaults[name] for name in options}
    for command, start in (("reconstruct", "random"), ("interpolate --image 0 1", "inverted"), ("edit --axis 0 --amount 1", "inverted")):
        name, *others = command.split()
        assert sampler_arguments(parser().parse_args([name, "run", "--output", "x.png", *others]))["x_T"] == start
        assert inspect.signature(getattr(sampling, name)).parameters["x_T"].default == start


BAD_INPUT = {
    "no such run": ("sample {inputs}/nowhere --output {out}/x.png", "no folder {inputs}/nowhere; expected a run folder or a saved model"),
    "not a run": ("sample {inputs}/empty --output {out}/x.png", "no config.json there; expected a run folder or a saved model"),
    "run without a model": ("sample {inputs}/unfinished --output {out}/x.png", "unfinished: has no model/ yet"),
    "damaged weights": ("sample {inputs}/damaged --output {out}/x.png", "damaged or not a safetensors file"),
    "report of no run": ("report {inputs}/empty", "empty: not a run folder"),
    "picture type": ("sample {run} --output {out}/x.jpg", "--output: expected a name ending in .png or .npz, found"),
    "latents as a picture": ("encode {run} --output {out}/x.png", "--output: expected a name ending in .npz or .parquet or .csv, found"),
    "no output folder": ("sample {run} --output {out}/a/b.png", "--output: no folder"),
    "no data file": ("encode {run} --data {inputs}/no.npy --output {out}/x.npz", "--data: no file"),
    "a folder of nothing": ("encode {run} --data {inputs}/empty --output {out}/x.npz", "--data: no images in {inputs}/empty"),
    "one image": (
        "encode {run} --data {inputs}/photos/a.png --output {out}/x.npz",
        "--data: expected a folder, or an .npy or .npz of images, found the file {inputs}/photos/a.png; give its folder",
    ),
    "no image that can be read": (
        "encode {run} --data {inputs}/broken --output {out}/x.npz",
        "--data: none of the 1 images in {inputs}/broken can be read: a.png (zero bytes)",
    ),
    "a file in place of a model": (
        "encode {inputs}/weights.pt --data {inputs}/good.npy --output {out}/x.npz",
        "expected a folder, found the file {inputs}/weights.pt; expected a run folder or a saved model",
    ),
    "output beside a file": (
        "sample {run} --output {inputs}/good.npy/x.png",
        "--output: expected a folder, found the file {inputs}/good.npy",
    ),
    "unreadable data": ("encode {run} --data {inputs}/text.npy --output {out}/x.npz", "not a readable .npy or .npz"),
    "pickled data": ("encode {run} --data {inputs}/pickle.npy --output {out}/x.npz", "not a readable .npy or .npz"),
    "range of data": ("encode {run} --data {inputs}/bright.npy --output {out}/x.npz", "--data: expected floats in [-1, 1]"),
    "several entries": ("encode {run} --data {inputs}/two.npz --output {out}/x.npz", "--array-key: no entry 'images'"),
    "image size": (
        "reconstruct {run} --data {inputs}/large.npy --output {out}/x.png",
        "large.npy: expected images of shape [1, 8, 8] (C, H, W) for this model, found [1, 16, 16]",
    ),
    "channels": ("encode {run} --data {inputs}/colour.npy --output {out}/x.npz", "expected images of shape [1, 8, 8] (C, H, W)"),
    "no data known": ("reconstruct {run}/model --output {out}/x.png", "has no config.yaml that says which images belong to it"),
    "data without use": ("sample {run} --data {inputs}/good.npy --output {out}/x.png", "--source is prior"),
    "too many images": ("encode {run} --data {inputs}/good.npy --count 6 --output {out}/x.npz", "--count: expected at most 5"),
    "no such axis": ("traverse {run} --axis 1 4 --output {out}/x.png", "--axis: expected 0 to 3, found 4"),
    "no such image": ("traverse {run} --data {inputs}/good.npy --image 5 --output {out}/x.png", "--image: expected 0 to 4, found 5"),
    "no live axis": ("traverse {inputs}/dead --data {inputs}/good.npy --output {out}/x.png", "--axis: no latent dimension is live"),
    "no saved axis": ("traverse {run} --axes {inputs}/axes.npz --axis 2 --output {out}/x.png", "--axis: expected 0 to 1, found 2"),
    "no axes file": ("encode {run} --axes {inputs}/no.npz --output {out}/x.npz", "no.npz: no such file of axes"),
    "not axes": ("encode {run} --axes {inputs}/two.npz --output {out}/x.npz", "two.npz: no entry 'center'"),
    "axes of another size": (
        "encode {run} --axes {inputs}/three.npz --output {out}/x.npz",
        "--axes: expected axes of 4 latent dimensions for this model, found 3",
    ),
    "edit of no axis": ("edit {run} --axis 4 --amount 1 --output {out}/x.png", "--axis: expected 0 to 3, found 4"),
    "edit of no image": (
        "edit {run} --data {inputs}/good.npy --axis 0 --amount 1 --image 0 9 --output {out}/x.png",
        "--image: expected 0 to 4",
    ),
    "between no image": (
        "interpolate {run} --data {inputs}/good.npy --image 5 0 --output {out}/x.png",
        "--image: expected 0 to 4, found 5",
    ),
    "noise against inversion": (
        "reconstruct {run} --x-T inverted --eta 1 --output {out}/x.png",
        "--eta: expected 0 or none with --x-T inverted, found 1",
    ),
    "noise against solver": (
        "sample {run} --solver ancestral --eta 0.5 --output {out}/x.png",
        "--eta: expected 1 or none with --solver ancestral, found 0.5",
    ),
    "noise in dpm2m": (
        "sample {run} --solver dpm2m --eta 1 --output {out}/x.png",
        "--eta: expected 0 or none with --solver dpm2m, found 1",
    ),
    "ancestral inversion": (
        "edit {run} --axis 0 --amount 1 --solver ancestral --output {out}/x.png",
        "--solver: expected ddim or dpm2m with --x-T inverted, found ancestral",
    ),
    "nothing to invert": (
        "reconstruct {inputs}/beta_vae --data {inputs}/good.npy --x-T inverted --output {out}/x.png",
        "a model of method beta_vae decodes and has no noise to invert; use --x-T random",
    ),
    "no prior": ("sample {inputs}/diffae --output {out}/x.png", "deterministic encoder has no prior to draw from; use --source posterior"),
    "level of another method": (
        "axes {run} --logsnr 1 --output {out}/x.npz",
        "--logsnr: only --method level looks at one noise level, and --method is scale",
    ),
    "diffae alone": ("sample {inputs}/diffae --source none --output {out}/x.png", "a model of method diffae draws only from latents"),
    "unknown device": ("sample {run} --device abacus --output {out}/x.png", "--device: abacus cannot be used here"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_sentence(case, run, inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(inputs / "cache"))
    command, message = BAD_INPUT[case]
    assert main(command.format(run=run, inputs=inputs, out=tmp_path).split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("sami-fast: ")
    assert message.format(run=run, inputs=inputs) in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["sample", "run"],
        ["sample", "run", "--output", "x.png", "--count", "0"],
        ["sample", "run", "--output", "x.png", "--count", "1.5"],
        ["sample", "run", "--output", "x.png", "--steps", "-3"],
        ["sample", "run", "--output", "x.png", "--guidance-scale", "nan"],
        ["sample", "run", "--output", "x.png", "--guidance-clip", "never"],
        ["sample", "run", "--output", "x.png", "--source", "posteriors"],
        ["traverse", "run", "--output", "x.png", "--axis", "-1"],
        ["traverse", "run", "--output", "x.png", "--axis", "x"],
        ["sample", "run", "--output", "x.png", "--solver", "heun"],
        ["sample", "run", "--output", "x.png", "--x-T", "inverted"],
        ["edit", "run", "--output", "x.png", "--axis", "0"],
        ["edit", "run", "--output", "x.png", "--axis", "0", "--amount", "nan"],
        ["interpolate", "run", "--output", "x.png", "--image", "1"],
        ["interpolate", "run", "--output", "x.png", "--image", "0", "1", "--count", "1"],
    ],
    ids=lambda arguments: " ".join(arguments) or "nothing",
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: sami-fast" in capsys.readouterr().err


def test_as_a_process(run, tmp_path):
    command = [sys.executable, "-m", "sami_fast.cli"]
    output = tmp_path / "s.png"
    arguments = ["sample", str(run), "--count", "1", *QUICK, "--output", str(output)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{output}: 1 image(s)\n"
    again = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert again.returncode == 2
    assert again.stderr == f"sami-fast: --output: {output} exists; choose another name or add --overwrite\n"


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom sami_fast.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False False"
