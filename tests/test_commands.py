"""What people expect of a command: examples in --help that run, training and its page of a run not started, programs, tables, progress."""

import argparse
import csv
import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import ROOT, TRAINING, shorter_training
from PIL import Image
from safetensors.torch import load_file, save_file
from threadpoolctl import threadpool_info
from torch import nn

from sami_fast import __version__, progress
from sami_fast.cli import main, parser
from sami_fast.cli.tables import columns_of
from sami_fast.config import builtin_configs, load_config, setting_keys, steps_beside_minutes, to_yaml
from sami_fast.errors import UserError
from sami_fast.methods.baselines import DiffAE
from sami_fast.methods.build import architecture_of
from sami_fast.methods.export import FORMATS, export_encoder
from sami_fast.methods.sami import Sami
from sami_fast.train import main as train_main
from sami_fast.train import parse, train

TINY = str(ROOT / "tests/tiny.yaml")
CURVE = {"kind": "cosine", "logsnr_min": -7.0, "logsnr_max": 5.0}


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


def example_of(text: str | None) -> str:
    """The command line that an epilog shows."""
    found = re.fullmatch(r"example: (.+?)(?:; .*)?", text or "")
    assert found, text
    return found[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder of what the examples take for granted: small runs, whose latents tell images apart, photos and an array."""
    folder = tmp_path_factory.mktemp("home")
    run = train(load_config(TINY, ["name=disks", f"runs_dir={folder / 'runs'}", "encoder.latent_size=8"]))
    weights = load_file(run / "model/model.safetensors")
    weights["encoder.mu.weight"][:3] *= 30
    save_file(weights, run / "model/model.safetensors")
    for seed in (0, 1):
        shutil.copytree(run, folder / f"runs/disks_seed{seed}")
    (folder / "photos").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"photos/{number}.png")
    np.save(folder / "photos.npy", images)
    return folder


# Examples


@pytest.mark.parametrize("command", [command for command in subcommands() if command != "explore"])  # which serves until it is stopped
def test_the_example_of_help_runs(command, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    example = example_of(subcommands()[command].epilog)
    assert example.startswith(f"sami-fast {command}")
    before = set(home.rglob("*"))
    words = shlex.split(re.sub(TRAINING, shorter_training, example))[1:]
    assert main(words) == 0, capsys.readouterr().err
    if "--output" in words:
        assert Path(words[words.index("--output") + 1]).stat().st_size > 100
    assert command in ("env", "plan", "completion") or set(home.rglob("*")) > before


def test_the_other_examples_are_of_commands_that_run(capsys):
    assert example_of(parser().epilog) == "sami-fast train --config disks"
    with pytest.raises(SystemExit):
        parse(["--help"])
    last = " ".join(capsys.readouterr().out.split("\n\n")[-1].split())
    assert f"sami-fast train {example_of(last).split('sami_fast/train.py ')[1]}" == example_of(subcommands()["train"].epilog)


def test_the_page_of_commands_has_every_example():
    page = (ROOT / "docs/commands.md").read_text()
    for command, found in subcommands().items():
        assert f"    {example_of(found.epilog)}\n" in page, command


# Training


def test_train_is_the_script(tmp_path, capsys):
    """The same lines, files and exit statuses; --threads is a setting."""
    told = []
    for name, start in (("script", train_main), ("command", lambda words: main(["train", *words]))):
        assert start(["--config", TINY, f"name={name}", f"runs_dir={tmp_path}", "--no-report", "--threads", "1", "log.every=6"]) == 0
        told.append([re.sub(r"\d+ images/s .*|in \d+ s|script|command", "", line) for line in capsys.readouterr().out.splitlines()])
        assert (tmp_path / name / "model/model.safetensors").is_file()
        assert load_config(str(tmp_path / name / "config.yaml")).engine.threads == 1
    assert told[0] == told[1]
    for wrong in ("--config no.yaml", "--resume --overwrite", f"--config {TINY} train.step=5", "--device abacus"):
        words, said = wrong.split(), []
        for start in (train_main, lambda words: main(["train", *words])):
            assert start(words) == 2
            said.append(capsys.readouterr().err)
        assert said[0] == said[1]
        assert said[0].startswith("sami-fast: ")


def test_several_processes_are_the_launchers(capsys):
    assert main(["train", "--config", "disks", "name=my run", "--num_gpus", "4", "--resume"]) == 2
    command = "deepspeed -q --num_accelerators 4 --module sami_fast.train --config disks 'name=my run' --resume"
    assert capsys.readouterr().err == f"sami-fast: --num_accelerators: this is one process; several are started by {command}\n"


def test_train_takes_a_device(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DS_ACCELERATOR", "")
    monkeypatch.setenv("LOCAL_RANK", "")
    assert main(["train", "--config", TINY, f"runs_dir={tmp_path}", "train.steps=2", "--no-report", "--device", "cpu"]) == 0
    assert "1 rank(s) on cpu, " in capsys.readouterr().out


def test_the_first_step_is_shown_soon(tmp_path, monkeypatch, capsys):
    """However many steps a line of the log is; it changes nothing of what is written."""
    for name, seconds in (("soon", 0.0), ("later", 1e9)):
        monkeypatch.setattr(sys.modules["sami_fast.train"], "FIRST_LINE", seconds)
        assert main(["train", "--config", TINY, f"name={name}", f"runs_dir={tmp_path}", "log.every=1000", "--no-report"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(" |")[0] for line in lines] == ["step 1/12", "step 12/12", "step 12/12"]
    assert re.fullmatch(r"step 1/12 \| loss -?[\d.]+ nats \| \d+ images/s \| \d+:\d\d:\d\d left", lines[0])
    clock = r'"(images_per_second|data_wait|seconds)": [^,]+'
    soon, later = (re.sub(clock, "", (tmp_path / name / "metrics.jsonl").read_text()) for name in ("soon", "later"))
    assert soon == later


def test_a_dry_run_is_a_page(tmp_path, capsys):
    arguments = ["train", "--config", TINY, "--dry-run", f"runs_dir={tmp_path}", "train.mode=staged", "train.denoiser_steps=30"]
    assert main(arguments) == 0
    page = capsys.readouterr().out
    parts = {line[:11].strip(): line[12:] for line in page.splitlines()[2:] if line[:11].strip()}
    assert list(parts) == ["images", "networks", "batch", "stages", "time", "memory", "folder", "writes"]
    assert parts["images"] == "endless, 8x8 pixels, 1 channel(s), with known factors x, y, background"
    encoder = sum(p.numel() for p in Sami.build(architecture_of(load_config(TINY), (1, 8, 8)), CURVE).encoder.parameters())
    assert parts["networks"] == f"encoder: {encoder:,} parameters, to 4 latents"
    assert parts["batch"] == "8 images a step"
    assert re.match(r"the denoiser alone: 30 steps of \S+ s, until \d:\d\d:\d\d", parts["stages"])
    assert re.match(r"\d:\d\d:\d\d by the speed of a few steps here, on 1 CPU thread", parts["time"])
    assert re.match(r"\d+\.\d GB at most in a rehearsed step, of \d", parts["memory"])
    assert parts["folder"] == str(tmp_path / "tiny")
    assert "checkpoints/: every 4 steps, at most 3 of " in page
    assert "# DeepSpeed" not in page
    assert "batch_size:" not in page
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_what_is_wrong_with_the_data(tmp_path, capsys):
    assert main(["train", "--config", "photos_small", f"data.path={tmp_path / 'nowhere'}", "--dry-run"]) == 2
    assert capsys.readouterr().err == f"sami-fast: data.path: no folder {tmp_path / 'nowhere'}\n"


def test_steps_beside_minutes_are_said_to_have_no_effect(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")  # then nothing is measured
    file = tmp_path / "mine.yaml"
    file.write_text(Path(TINY).read_text().replace("train: {", "train: {minutes: 5, "))
    assert main(["train", "--config", str(file), "--dry-run"]) == 0
    said = capsys.readouterr()
    assert said.err == f"{file}: train.minutes is 5, so train.steps beside it has no effect\n"
    assert "8 images a step, 4 at a time on each of 2 process(es)" in said.out
    saved = tmp_path / "saved.yaml"  # a run's own, which names every setting
    saved.write_text(to_yaml(load_config("photos_small", ["data.path=photos"])))
    assert [steps_beside_minutes(name) for name in (str(saved), "photos_small", "disks", None)] == [""] * 4


# Programs


def model_of(encoder: dict, kind: type = Sami):
    image = {"image_channels": encoder["image_channels"], "image_size": encoder["image_size"]}
    denoiser = image | {"channels": [8, 8], "embedding_size": 8, "groups": 4}
    torch.manual_seed(0)
    if kind is DiffAE:
        denoiser["latent_size"] = encoder["latent_size"]
    if encoder.pop("half", False):
        encoder = {"half_of": denoiser, "latent_size": encoder["latent_size"]}
    model = kind.build({"encoder": encoder, "denoiser": denoiser}, CURVE).eval()
    nn.init.normal_(model.encoder.mu.weight, std=0.5)
    return model


ENCODERS = {
    "attention": {"image_channels": 3, "image_size": 18, "latent_size": 5, "channels": [8, 8], "blocks": 1, "attention": [9]},
    "bias-free": {"image_channels": 1, "image_size": 8, "latent_size": 3, "channels": [8], "style": "bias_free_relu"},
    "half": {"image_channels": 1, "image_size": 8, "latent_size": 3, "half": True},
}


@pytest.mark.parametrize(
    ("form", "name", "kind"),
    [
        *((form, "attention", Sami) for form in FORMATS),
        ("torch.export", "bias-free", Sami),
        ("torch.export", "half", Sami),
        ("torchscript", "bias-free", DiffAE),
    ],
    ids=str,
)
def test_an_exported_encoder_gives_the_same_numbers(form, name, kind, tmp_path):
    """For any number of images, with nothing of this package in it; a deterministic encoder's variance is 0."""
    model, file = model_of(dict(ENCODERS[name]), kind), tmp_path / f"encoder{FORMATS[form]}"
    vars(model.denoiser)["__deepcopy__"] = lambda memo: pytest.fail("the denoiser is large, and nobody needs a copy of it")
    if form == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    assert export_encoder(model, file, form) <= 1e-5
    if form == "onnx":
        session = onnxruntime.InferenceSession(file)
        assert [each.name for each in (*session.get_inputs(), *session.get_outputs())] == ["images", "mu", "var"]
        program = lambda x: map(torch.from_numpy, session.run(None, {"images": x.numpy()}))  # noqa: E731
    elif form == "torchscript":
        program = torch.jit.load(file)
    else:
        exported = torch.export.load(file)
        assert not [node for node in exported.graph.nodes if "sami_fast" in str(node.target)]
        program = exported.module()
    for count in (1, 13):
        x = torch.rand(count, *model.image_shape, generator=torch.Generator().manual_seed(count)) * 2 - 1
        with torch.no_grad():
            expected = model.encode(x)
            mu, var = program(x)
        np.testing.assert_allclose(mu, expected.mu, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(var, expected.var, atol=1e-5, rtol=1e-5)
        assert bool((var == 0).all()) is (kind is DiffAE)


def shapes_of_encoders() -> dict[tuple, str]:
    """The shipped configs by what their encoders are made of, the first of each."""
    found: dict[tuple, str] = {}
    for file in sorted(builtin_configs().glob("*.yaml")):
        path = ["data.path=somewhere"] if "path" in file.read_text() else []
        config = load_config(file.stem, path)
        encoder = config.encoder
        found.setdefault((encoder.style, encoder.blocks, bool(encoder.attention), encoder.start, config.method), file.stem)
    return found


@pytest.mark.parametrize("name", shapes_of_encoders().values())
def test_every_shipped_encoder_can_be_exported(name, tmp_path):
    """With narrow layers; what they are made of is the config's own."""
    config = load_config(name, ["data.path=somewhere"] if "path" in (builtin_configs() / f"{name}.yaml").read_text() else [])
    size = min(config.data.image_size or 16, 64)
    encoder = architecture_of(config, (3, size, size))["encoder"]
    stages = len(encoder["channels"])
    sides = [-(-size // 2**stage) for stage in range(1, stages + 1)]
    encoder |= {"channels": [8] * stages, "groups": 4, "attention": [side for side in encoder["attention"] or [] if side in sides]}
    assert export_encoder(model_of(encoder), tmp_path / "encoder.pt2", "torch.export") <= 1e-5


def test_what_cannot_be_exported_is_refused_in_a_sentence(tmp_path, monkeypatch):
    model = model_of(dict(ENCODERS["bias-free"]))

    class OfItsBatch(nn.Module):
        """Another number for every batch, of which a traced program knows one."""

        image_shape, latent_size = (1, 8, 8), 3

        def forward(self, x):
            mu = x.flatten(1)[:, :3] + float(len(x))
            return mu, torch.ones_like(mu)

    model.encoder = OfItsBatch()
    (tmp_path / "encoder.pt").write_text("as it was")
    with pytest.raises(UserError, match=r"the torchscript program differs from the encoder by .*, and 1e-05 is allowed"):
        export_encoder(model, tmp_path / "encoder.pt", "torchscript")

    class WithoutVariance(OfItsBatch):
        def forward(self, x):
            mu = x.flatten(1)[:, :3]
            return mu, torch.full_like(mu, torch.nan)

    model.encoder = WithoutVariance()
    with pytest.raises(UserError, match="gives results that are not finite numbers"):
        export_encoder(model, tmp_path / "encoder.pt", "torchscript")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"onnx needs onnx, which is not installed; `pip install 'sami-fast\[export\]'`"):
        export_encoder(model, tmp_path / "encoder.onnx", "onnx")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"encoder.pt": "as it was"}


def test_export_of_the_command(tmp_path, capsys):
    assert main(["export", str(ROOT / "tests/disks_model"), "--format", "torchscript", "--output", str(tmp_path / "e.onnx")]) == 2
    assert "--output: expected a name ending in .pt for torchscript, found" in capsys.readouterr().err
    arguments = [
        "export",
        str(ROOT / "tests/disks_model"),
        "--format",
        "torch.export",
        "--output",
        str(tmp_path / "e.pt2"),
        "--threads",
        "1",
    ]
    assert main(arguments) == 0
    assert "images [B, 1, 16, 16] in [-1, 1] to mu, var [B, 8]; differs from the model by" in capsys.readouterr().out


# Tables


def test_encodings_as_tables(home, tmp_path, monkeypatch, capsys):
    """The same numbers as in the .npz, with names, and a reason where an image cannot be read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    photos = tmp_path / "photos"
    shutil.copytree(home / "photos", photos)
    (photos / "3.png").write_bytes(b"")
    run = ["encode", str(home / "runs/disks"), "--data", str(photos)]
    for output in (["z.npz"], ["z.csv"], ["z.parquet"], ["z.txt", "--format", "csv"]):
        assert main([*run, "--output", str(tmp_path / output[0]), *output[1:]]) == 0, capsys.readouterr().err
    arrays = np.load(tmp_path / "z.npz")
    rows = list(csv.DictReader((tmp_path / "z.csv").open()))
    assert (tmp_path / "z.txt").read_bytes() == (tmp_path / "z.csv").read_bytes()
    assert list(rows[0]) == ["image", "file", *(f"{kind}_{latent}" for kind in ("mu", "std") for latent in range(8)), "absent"]
    assert [row["file"] for row in rows] == arrays["files"].tolist()
    table = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "z.parquet")
    assert table.column_names == list(rows[0])
    assert table["file"].to_pylist() == arrays["files"].tolist()
    assert str(table.schema.field("mu_0").type) == "float"
    for latent in range(4):
        for kind, expected in (("mu", arrays["mu"]), ("std", np.sqrt(arrays["var"]))):
            of_csv = np.array([float(row[f"{kind}_{latent}"] or "nan") for row in rows], np.float32)
            np.testing.assert_array_equal(of_csv, expected[:, latent])
            np.testing.assert_array_equal(table[f"{kind}_{latent}"].to_numpy(), expected[:, latent])
    bad = arrays["files"].tolist().index("3.png")
    assert (rows[bad]["absent"], rows[bad]["mu_0"]) == ("3.png: zero bytes", "")
    assert [bool(row["absent"]) for row in rows] == [place == bad for place in range(len(rows))]


def test_factors_and_axes_are_columns(home, tmp_path):
    assert main(["encode", str(home / "runs/disks"), "--count", "3", "--output", str(tmp_path / "z.csv")]) == 0
    assert (tmp_path / "z.csv").read_text().splitlines()[0].endswith("std_7,factor_x,factor_y,factor_background")
    none, axes = np.zeros((2, 0)), np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    columns = columns_of({"mu": none, "var": none, "axes": axes, "axis_names": ["size", "size", "size_2"]})
    assert list(columns) == ["image", "axis_size", "axis_size_2", "axis_size_2_2"]  # none of them in another's place
    assert [columns[name].tolist() for name in list(columns)[1:]] == axes.T.tolist()


# Words of a command line


def test_version(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"sami-fast {__version__}\n"


def test_options_and_settings_come_in_any_order():
    for words in ("data video data.path=x --output y data.cache_dir=z", "data --output y video data.path=x data.cache_dir=z"):
        arguments = parser().parse_args(words.split())
        assert (arguments.config, arguments.overrides, arguments.output) == ("video", ["data.path=x", "data.cache_dir=z"], "y")


def test_a_single_picture_is_no_folder(home, tmp_path, capsys):
    assert main(["encode", str(home / "runs/disks"), "--data", str(home / "photos/0.png"), "--output", str(tmp_path / "z.npz")]) == 2
    assert capsys.readouterr().err.endswith("0.png; give its folder\n")


def test_numbers_of_an_option_take_no_other_words():
    arguments = parser().parse_args(["plan", "--gpus", "1", "8", "disks", "train.batch_size=512", "--json"])
    assert (arguments.gpus, arguments.config, arguments.overrides, arguments.json) == ([1, 8], "disks", ["train.batch_size=512"], True)
    words = ["edit", "--axis", "2", "--amount", "-1", "1", "runs/disks", "--output", "x.png", "--image", "0", "5"]
    arguments = parser().parse_args(words)
    assert (arguments.run, arguments.amount, arguments.image) == ("runs/disks", [-1.0, 1.0], [0, 5])


@pytest.mark.parametrize(
    "command", ["encode", "sample", "reconstruct", "traverse", "interpolate", "edit", "evaluate", "axes", "report", "explore", "train"]
)
def test_every_command_that_runs_a_model_takes_threads_and_a_device(command):
    assert {"--threads", "--device"} <= subcommands()[command]._option_string_actions.keys()


def test_threads_are_torchs_and_those_of_matrix_products(home, tmp_path, monkeypatch):
    def threads() -> set[int]:
        return {torch.get_num_threads(), *(library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas")}

    seen, before = [], threads()
    monkeypatch.setattr("sami_fast.cli.tables.write_bytes", lambda path, content: seen.append(threads()))
    asked = max(before) + 1
    assert main(["encode", str(home / "runs/disks"), "--count", "2", "--threads", str(asked), "--output", str(tmp_path / "z.csv")]) == 0
    assert (seen, threads()) == ([{asked}], before)


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_a_device_that_is_not_there(command, home, capsys):
    assert main([command, str(home / "runs/disks"), "--device", "cuda:99"]) == 2
    assert "--device: cuda:99 cannot be used here" in capsys.readouterr().err


def completed(script: str, *words: str) -> list[str]:
    """What bash offers for the last word."""
    line = " ".join(f"'{word}'" for word in words)
    code = f'{script}\ncompopt() {{ :; }}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _sami_fast; printf "%s\\n" "${{COMPREPLY[@]}}"'
    return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_completion(capsys):
    for shell in ("zsh", "fish", "bash"):
        assert main(["completion", shell]) == 0
        script = capsys.readouterr().out
        for word in ("traverse", "--guidance-scale", "data.path="):
            assert word in script
    assert completed(script, "sami-fast", "tra") == ["train", "traverse"]
    assert completed(script, "sami-fast", "encode", "--ov") == ["--overwrite"]
    assert completed(script, "sami-fast", "train", "--config", "disks", "data.pa") == ["data.path="]
    assert set(completed(script, "sami-fast", "train", "train.")) == {f"{key}=" for key in setting_keys() if key.startswith("train.")}


# Progress


def test_a_bar_is_for_a_terminal_and_for_commands(monkeypatch):
    """Nothing elsewhere; on a terminal the time that is left, as h:mm:ss."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def shown(stream: io.StringIO) -> str:
        monkeypatch.setattr("sys.stderr", stream)
        with progress.bar(8000, "encoding", "images") as bar:
            if not bar.disable:
                bar.start_t -= 2 * 3600  # as if it had begun two hours ago
            bar.update(2000)
            bar.refresh()
        return stream.getvalue()

    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    assert shown(Terminal()) == ""
    with progress.shown():
        assert shown(io.StringIO()) == ""
        assert re.search(r"encoding: +25%\|.*\| 2000/8000 images, (5:59:5\d|6:00:0\d) left", shown(Terminal()))
    assert [progress.hms(seconds) for seconds in (0, 59.6, 3599, 3600 * 25 + 61)] == ["0:00:00", "0:01:00", "0:59:59", "25:01:01"]
