"""Settings: defaults, files, overrides, the DeepSpeed dict; and every sentence a user's mistake gets, with exit status 2."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sami_fast.config import Config, builtin_configs, deepspeed_dicts, load_config, setting_keys, settings_table, to_yaml
from sami_fast.errors import UserError
from sami_fast.train import main

ROOT = Path(__file__).resolve().parents[1]


def test_defaults_file_and_overrides_are_layered(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("seed: 3\ntrain: {steps: 900, batch_size: 16}\n")
    config = load_config(str(file), ["train.steps=1000", "data.disks.y=[0.3, 0.7]", "optimizer.lr=3e-4"])
    assert (config.seed, config.train.steps, config.train.batch_size) == (3, 1000, 16)
    assert config.data.disks.y == [0.3, 0.7]
    assert config.optimizer.lr == 3e-4
    assert config.train.mode == Config().train.mode


def test_yaml_round_trip(tmp_path):
    config = load_config("disks", ["seed=5", "encoder.attention=[4]"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "config.yaml")) == config


TEXTS = [
    *("1e3", "yes", "on", "007", "010", "12:30", "1_000", "1.10", "2024-01-01", "null", "~"),
    *("photos #1", "a: b", "[a", "${HOME}", "'quoted'"),
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_it_is_written(text, tmp_path):
    """Also where YAML would read a number, a truth value, a comment or nothing at all in it."""
    config = load_config(None, ["data.kind=array", "data.path=mine.npz", f"data.array_key={text}"])
    assert config.data.array_key == text
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "config.yaml")) == config


def test_plain_text_in_a_file_stays_what_it_is(tmp_path):
    text = "name: 1e3\ndata: {kind: image_folder, path: 007, labels: 'a #1'}\nlog: {csv: on}\noptimizer: {lr: 1e-3}\nseed: 0x10\n"
    (tmp_path / "run.yaml").write_text(text)
    config = load_config(str(tmp_path / "run.yaml"))
    assert (config.name, config.data.path, config.data.labels) == ("1e3", "007", "a #1")
    assert (config.log.csv, config.optimizer.lr, config.seed) == (True, 1e-3, 16)


@pytest.mark.parametrize("text", ["${name}", "${oc.env:HOME}", "${seed}"])
def test_nothing_is_interpolated(text, tmp_path):
    (tmp_path / "run.yaml").write_text(f"data: {{kind: array, path: '{text}'}}\n")
    assert load_config(str(tmp_path / "run.yaml")).data.path == text
    (tmp_path / "run.yaml").write_text(f"train: {text}\n")
    with pytest.raises(UserError, match="train: expected settings below it"):
        load_config(str(tmp_path / "run.yaml"))


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = ["runs_dir=~/runs", "data.path=~/photos", "data.labels=~/labels.csv", "data.cache_dir=~", "denoiser.pretrained=~/ddpm"]
    config = load_config(None, ["data.kind=image_folder", "train.mode=frozen", *paths])
    assert (config.runs_dir, config.data.path, config.data.cache_dir) == (f"{tmp_path}/runs", f"{tmp_path}/photos", str(tmp_path))
    assert (config.data.labels, config.denoiser.pretrained) == (f"{tmp_path}/labels.csv", f"{tmp_path}/ddpm")
    (tmp_path / "run.yaml").write_text("seed: 7\n")
    assert load_config("~/run.yaml").seed == 7
    with pytest.raises(UserError, match=r"~nobody_here/runs: no home folder of that name; write ./~nobody_here/runs for"):
        load_config(None, ["runs_dir=~nobody_here/runs"])


def test_yaml_anchors_and_merge_keys(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("encoder: &net {channels: &widths [8, 8], groups: 2}\ndenoiser: {<<: *net, groups: 4}\n")
    config = load_config(str(file))
    assert config.encoder.channels == config.denoiser.channels == [8, 8]
    assert (config.encoder.groups, config.denoiser.groups) == (2, 4)


def test_an_override_of_a_section_leaves_the_rest_of_it(tmp_path):
    (tmp_path / "run.yaml").write_text("optimizer: {lr: 0.5}\n")
    config = load_config(str(tmp_path / "run.yaml"), ["optimizer={eps: 1e-3, warmup_steps: 7}"])
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.warmup_steps) == (0.5, 1e-3, 7)


def test_every_builtin_config_loads():
    files = list(builtin_configs().glob("*.yaml"))
    assert files
    for file in files:
        overrides = ["data.path=images"] if re.search(r"kind: (\w+_folder|celeba|array)", file.read_text()) else []
        assert load_config(str(file), overrides).name == file.stem


def test_every_setting_says_what_it_means():
    for key, item in setting_keys().items():
        assert item.metadata["help"], key
    assert "optimizer.clip=" in settings_table()


def test_deepspeed_dicts_set_what_deepspeed_would_guess():
    config = load_config(None, ["train.batch_size=48", "engine.gradient_accumulation=3", "engine.zero_stage=2", "optimizer.clip=0"])
    settings = deepspeed_dicts(config, world_size=2)["both"]
    assert settings["train_micro_batch_size_per_gpu"] == 8
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["gradient_clipping"] == 0
    assert settings["zero_optimization"]["stage"] == 2


def test_dry_run_prints_config_and_deepspeed_settings(capsys):
    arguments = ["--config", "disks", "train.steps=777", "engine.threads=1", "--dry-run", "--verbose"]
    assert main([*arguments, "engine.kind=deepspeed"]) == 0
    text = capsys.readouterr().out
    head, _, tail = text.partition("# DeepSpeed")
    assert "steps: 777" in head
    assert json.loads(tail)["both"]["gradient_clipping"] == load_config("disks").optimizer.clip


@pytest.mark.parametrize("flag", ["--help", "--settings"])
def test_help_and_settings_as_a_command(flag, tmp_path):
    """Run as a script from another folder: its own folder must not hide other modules."""
    done = subprocess.run([sys.executable, ROOT / "sami_fast/train.py", flag], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ("example: deepspeed" if flag == "--help" else "train.steps=") in done.stdout


SETTING_ERRORS = [
    (["train.step=5"], "train.step: no such setting", "did you mean train.steps?"),
    (["trian.steps=5"], "trian.steps: no such setting", "did you mean train.steps?"),
    (["trian={steps: 5}"], "trian: no such setting", "did you mean train?"),
    (["steps=5"], "steps: no such setting", "did you mean train.steps?"),
    (["image_size=64"], "image_size: no such setting", "did you mean data.image_size?"),
    (["train.image_size=64"], "train.image_size: no such setting", "did you mean data.image_size?"),
    (["channels=3"], "channels: no such setting", "did you mean data.channels or encoder.channels or denoiser.channels?"),
    (["a\nb=1"], "a\\nb: no such setting", ""),
    (["data.disks.z=[0,1]"], "data.disks.z: no such setting", "did you mean data.disks"),
    (["train.steps=abc"], "train.steps: expected a whole number, found 'abc'", "(command line)"),
    (["train.steps=1.5"], "train.steps: expected a whole number, found '1.5'", ""),
    (["train.steps=010"], "train.steps: expected a whole number, found '010'", ""),
    (["train.steps=12:30"], "train.steps: expected a whole number, found '12:30'", ""),
    (["train.steps=null"], "train.steps: expected a whole number, found 'null'", ""),
    (["train.steps="], "train.steps: expected a whole number, found ''", ""),
    (["log.csv=maybe"], "log.csv: expected true or false, found 'maybe'", ""),
    (["optimizer.lr=fast"], "optimizer.lr: expected a number, found 'fast'", ""),
    (["optimizer.lr=!!float 3"], "optimizer.lr: '!!float 3' is not a value that YAML can read", "tag"),
    (["optimizer.betas=3"], "optimizer.betas: expected a list in brackets, such as [1,2], found '3'", ""),
    (["optimizer.betas=&a [*a]"], "optimizer.betas[0]: expected a number, found a list", ""),
    (["data.sprites.shapes=heart"], "data.sprites.shapes: expected a list in brackets, such as [a,b], found 'heart'", ""),
    (["encoder.channels=64,64"], "encoder.channels: expected a list in brackets", "found '64,64'"),
    (["encoder.channels=[64,", "64]"], "encoder.channels: '[64,' is not a value that YAML can read", "needs quotes around it in a shell"),
    (["encoder.channels=" + "[" * 5000], "encoder.channels:", "too many brackets within brackets"),
    (["encoder.channels=[a]"], "encoder.channels[0]: expected a whole number, found 'a'", ""),
    (["train.steps"], "train.steps: expected key=value", "train.steps=50"),
    (["=5"], "=5: expected key=value", ""),
    (["train.steps=[1"], "train.steps: '[1' is not a value that YAML can read", ""),
    (["train.stesp=5"], "train.stesp: no such setting", "did you mean train.steps?"),
    (["data.flip=3.5"], "data.flip: expected true or false, found '3.5'", ""),
    (["encoder.channels=64"], "encoder.channels: expected a list in brackets", "found '64'"),
    (["train=???"], "train: expected settings below it", "'???'"),
    (["seed=" + "9" * 400], "seed: expected at least 0", ""),
    (["optimizer.eps=0"], "optimizer.eps: expected above 0", "found 0.0"),
    (["train=5"], "train: expected settings below it", "found '5'"),
    (["train.steps=0"], "train.steps: expected at least 1", "found 0"),
    (["seed=-1"], "seed: expected at least 0", "found -1"),
    (["optimizer.lr=0"], "optimizer.lr: expected above 0", "found 0.0"),
    (["optimizer.lr=nan"], "optimizer.lr: expected above 0", "found nan"),
    (["optimizer.lr=1e999"], "optimizer.lr: expected above 0", "found inf"),
    (["optimizer.betas=[0.9,1.5]"], "optimizer.betas: expected two numbers of at least 0 and below 1", "[0.9, 1.5]"),
    (["data.disks.x=[0.9,0.1]"], "data.disks.x: expected two numbers", "[0.9, 0.1]"),
    (["encoder.channels=[64,0]"], "encoder.channels: expected at least 1", "[64, 0]"),
    (["encoder.channels=[]"], "encoder.channels: expected at least one level", "none"),
    (["data.kind=foo"], "data.kind: expected one of disks, sprites, rooms, avatars, image_folder, video_folder", "'foo'"),
    (["schedule.kind=linear"], "schedule.kind: expected one of uniform_logsnr, cosine, linear_beta", "'linear'"),
    (["objective.weighting=snr"], "objective.weighting: expected one of elbo", "'snr'"),
    (["engine.zero_stage=4"], "engine.zero_stage: expected 0, 1, 2 or 3", "found 4"),
    (["engine.precision=fp16"], "engine.precision: expected one of fp32, bf16", "'fp16'"),
    (["engine.tf32=true", "engine.precision=bf16"], "engine.tf32: true is for engine.precision fp32, found bf16", ""),
    (["name=a/b"], "name: expected a plain folder name", "'a/b'"),
    (["name=.."], "name: expected a plain folder name", "'..'"),
    (["schedule.logsnr_min=6"], "schedule.logsnr_min: expected less than logsnr_max = 5", "found 6"),
    (["train.denoiser_warmup=1"], "train.denoiser_warmup: expected at least 0 and at most 0.99", "found 1.0"),
    (["train.mode=frozen"], "denoiser.pretrained: train.mode frozen and finetune need it", ""),
    (["denoiser.pretrained=runs/a"], "denoiser.pretrained:", "no use for it"),
    (["data.kind=array"], "data.path: data.kind array needs the path", ""),
    (["kl_weight.end=0"], "kl_weight.kind: exponential needs", "linear"),
    (["kl_weight.kind=controller"], "kl_weight.target: expected above 0 nats", "found 0"),
    (["kl_weight.kind=controller", "kl_weight.target=5", "kl_weight.start=2"], "kl_weight.start: expected between", "found 2"),
    (["denoiser.embedding_size=7"], "denoiser.embedding_size: expected an even number", "found 7"),
    (["optimizer.implementation=apex"], "optimizer.implementation: apex asked for, but NVIDIA apex is not installed", "use torch"),
    (["log.wandb=true"], "log.wandb: asked for, but wandb is not installed", ""),
    (["--resume", "--overwrite"], "--resume and --overwrite: choose one", ""),
    (["--dry-run", "train.batch_size=63", "engine.gradient_accumulation=2"], "train.batch_size: expected a multiple of 2", "found 63"),
    (["--config", "no/such.yaml"], "--config: no file no/such.yaml", "disks"),
]


def expect_user_error(arguments, capsys, *fragments):
    """Exit status 2 and one sentence on stderr with these fragments."""
    assert main(arguments) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("sami-fast: ")
    assert "\n" not in message
    assert "Traceback" not in message
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    ("arguments", "start", "fragment"), SETTING_ERRORS, ids=lambda value: None if isinstance(value, str) else " ".join(value)
)
def test_bad_setting_gets_one_sentence(arguments, start, fragment, capsys):
    expect_user_error(arguments, capsys, f"sami-fast: {start}", fragment)


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"train: {steps: 5", "is not valid YAML"),
        (b"- a\n- b\n", "found a list"),
        (b"\xff\xfe\x00broken", "--config:"),
        (b"train: 5\n", "train: expected settings below it"),
        (b"train: {stepz: 5}\n", "train.stepz: no such setting"),
        (b"seed: 1\nseed: 2\n", "is not valid YAML: line 2: found duplicate key seed"),
        (b"train: {steps: 5}\ntrain.steps: 6\n", "train.steps: expected once, found twice"),
        (b"just words\n", "should hold `key: value` lines, found 'just words'"),
        (b"a: &a {b: *a}\n", "a: no such setting"),
        (b'runs_dir: "a\\0b"\n', "runs_dir: expected text, found 'a\\x00b'"),
        (b"train: {steps: 5}\ntrain: {batch_size: 4}\n", "found duplicate key train"),
    ],
)
def test_bad_config_file_gets_one_sentence(content, fragment, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    expect_user_error(["--config", str(file)], capsys, fragment)


def _cut(path, images):
    np.savez(path, images=images)
    path.write_bytes(path.read_bytes()[:-200])


def _with_a_text_entry(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images", "not an array")


IMAGES = np.zeros((20, 8, 8, 1), np.uint8)
DATA_ERRORS = [
    ("missing.npz", lambda path: None, [], "data.path: no file"),
    ("folder.npz", lambda path: path.mkdir(), [], "data.path: expected a file, found the folder"),
    ("text.npy", lambda path: path.write_text("hello"), [], "is not a readable .npy or .npz"),
    ("zero.npy", lambda path: path.touch(), [], "is not a readable .npy or .npz"),
    ("cut.npz", lambda path: _cut(path, IMAGES), [], "is not a readable .npy or .npz"),
    ("pickle.npy", lambda path: np.save(path, np.array([{}], dtype=object), allow_pickle=True), [], "is not a readable .npy or .npz"),
    ("two.npz", lambda path: np.savez(path, a=IMAGES, b=IMAGES), [], "data.array_key: no entry 'images'"),
    ("key.npz", lambda path: np.savez(path, a=IMAGES), ["data.array_key=b"], "data.array_key: no entry 'b'"),
    ("flat.npy", lambda path: np.save(path, np.zeros((5, 8), np.uint8)), [], "expected images (N, H, W)"),
    ("wide.npy", lambda path: np.save(path, np.zeros((5, 8, 16), np.uint8)), [], "expected square images"),
    ("many.npy", lambda path: np.save(path, np.zeros((5, 8, 8, 7), np.uint8)), [], "expected 1 to 4 channels"),
    ("none.npy", lambda path: np.save(path, IMAGES[:0]), [], "no images in"),
    ("int.npy", lambda path: np.save(path, IMAGES.astype(np.int64)), [], "expected uint8 or floats"),
    ("range.npy", lambda path: np.save(path, IMAGES.astype(np.float32) + 255), [], "expected floats in [-1, 1]"),
    ("nan.npy", lambda path: np.save(path, IMAGES.astype(np.float32) + np.nan), [], "expected floats in [-1, 1]"),
    ("named.npy", lambda path: np.save(path, IMAGES), ["data.array_key=images"], "data.array_key:"),
    ("bytes.npz", lambda path: _with_a_text_entry(path), [], "is not an array"),
    ("small.npy", lambda path: np.save(path, np.zeros((20, 7, 7), np.uint8)), [], "image size 7 is below 8"),
    ("two.npy", lambda path: np.save(path, np.zeros((5, 8, 8, 2), np.uint8)), ["data.channels=1"], "data.channels: expected 2 for"),
]


@pytest.mark.parametrize(("name", "make", "overrides", "fragment"), DATA_ERRORS, ids=[case[0] for case in DATA_ERRORS])
def test_bad_data_gets_one_sentence(name, make, overrides, fragment, tmp_path, capsys):
    make(tmp_path / name)
    arguments = ["data.kind=array", f"data.path={tmp_path / name}", f"runs_dir={tmp_path / 'runs'}", *overrides]
    expect_user_error(arguments, capsys, fragment)
    assert not (tmp_path / "runs").exists()


def test_unreadable_config_is_named(tmp_path):
    with pytest.raises(UserError, match=f"--config: expected a file, found the folder {tmp_path}"):
        load_config(str(tmp_path))


# What is left to the data, and stages


def test_only_settings_that_can_be_left_to_the_data_may_be_auto():
    assert load_config(None, ["schedule.logsnr_min=auto"]).schedule.logsnr_min is None
    assert load_config(None, ["schedule.logsnr_min=-3"]).schedule.logsnr_min == -3
    with pytest.raises(UserError, match=r"schedule\.logsnr_max: expected a number, found 'auto'"):
        load_config(None, ["schedule.logsnr_max=auto"])
    with pytest.raises(UserError, match=r"schedule\.logsnr_min: expected a number, found 'none'"):
        load_config(None, ["schedule.logsnr_min=none"])


def test_auto_survives_the_saved_config(tmp_path):
    config = load_config(None, ["schedule.logsnr_min=auto", "train.mode=staged"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "config.yaml")) == config
    assert "schedule.logsnr_min=-7.0" in settings_table()


def test_phases_of_a_staged_run():
    config = load_config(None, ["train.mode=staged", "train.steps=10", "train.encoder_warmup=0.6", "train.bank_steps=4"])
    assert [config.phase(step) for step in range(10)] == ["encoder"] * 6 + ["both"] * 4
    assert [config.shown(step) for step in range(10)] == [0, 1, 2, 3, 0, 1, 6, 7, 8, 9]
    assert config.first_network == "encoder"
    alone = load_config(None, ["train.mode=denoiser", "train.steps=10"])
    assert {alone.phase(step) for step in range(10)} == {"denoiser"}
    assert alone.first_network == load_config(None).first_network == "denoiser"


def test_methods_without_a_denoiser_of_their_own_take_staged_configs_jointly():
    config = load_config("photos_small", ["data.path=photos", "method=beta_vae"])
    assert (config.train.mode, config.mode) == ("staged", "joint")
    assert {config.phase(step) for step in (0, config.train.steps - 1)} == {"both"}
    with pytest.raises(UserError, match=r"train\.mode: expected joint with method beta_vae, found denoiser"):
        load_config(None, ["method=beta_vae", "train.mode=denoiser"])
