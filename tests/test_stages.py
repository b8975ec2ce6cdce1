"""Staged runs: the denoiser alone, then the encoder beside it; what is shared, what a kill costs, how minutes become steps."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, assert_same_weights, rows, tiny, weights

from sami_fast import budget, progress, stages
from sami_fast.budget import Pace
from sami_fast.config import load_config, to_yaml
from sami_fast.data import Dataset
from sami_fast.data.spectrum import cleanest_guided_level, eigenvalues, noisiest_level
from sami_fast.engine.bank import Bank
from sami_fast.errors import UserError
from sami_fast.named import _digest
from sami_fast.train import main, train

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, str(ROOT / "sami_fast/train.py"), "--config", str(ROOT / "tests/tiny.yaml"), "--no-report"]
STAGED = ["train.mode=staged", "train.denoiser_steps=8", "train.encoder_warmup=0.5", "train.bank_steps=4", "kl_weight.kind=auto"]
BY_MINUTES = [option for option in STAGED if "steps=" not in option or "bank" in option]


def denoisers(folder: Path) -> list[Path]:
    return sorted((folder / stages.DENOISERS).iterdir())


def of_denoiser(run: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights(run).items() if name.startswith("denoiser.")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted staged run."""
    return train(tiny(tmp_path_factory.mktemp("runs"), *STAGED))


# ---- the stages


def test_a_staged_run_is_its_stages_one_after_the_other(finished, tmp_path):
    """By hand: a run of the denoiser, then a finetune run beside it."""
    (first,) = denoisers(finished.parent)
    by_hand = ["name=by_hand", "train.mode=finetune", f"denoiser.pretrained={first}", *STAGED[2:]]
    run = train(tiny(tmp_path, *by_hand))
    assert_same_weights(run, finished)
    assert [row["step"] for row in rows(first)] == list(range(1, 9))
    assert [row["step"] for row in rows(finished)] == list(range(1, 13))


def test_the_encoder_learns_alone_and_then_beside_the_denoiser(finished):
    (first,) = denoisers(finished.parent)
    alone = train(tiny(finished.parent, "name=alone", *STAGED, "train.encoder_warmup=1"))
    for name, value in of_denoiser(first).items():
        assert torch.equal(of_denoiser(alone)[name], value), name
    assert any(not torch.equal(of_denoiser(finished)[name], value) for name, value in of_denoiser(first).items())


def test_runs_that_differ_in_the_encoder_share_the_denoiser(finished, capfd):
    folder = finished.parent
    others = (["encoder.latent_size=3"], ["kl_weight.fall=0.3"], ["objective.free_bits=0.1"], ["train.steps=3"], ["log.every=2"])
    for place, settings in enumerate(others):
        train(tiny(folder, f"name=other{place}", *STAGED, *settings))
    assert len(denoisers(folder)) == 1
    assert capfd.readouterr().out.count("done before") == len(others)
    train(tiny(folder, *STAGED), overwrite=True)  # the run's folder is replaced, the denoiser stays
    assert len(denoisers(folder)) == 1
    for settings in (
        ["seed=1"],
        ["data.disks.x=[0.3,0.7]"],
        ["denoiser.channels=[4,4]"],
        ["train.denoiser_steps=2"],
        ["optimizer.lr=0.01"],
    ):
        train(tiny(folder, "name=another", *STAGED, *settings), overwrite=True)
    assert len(denoisers(folder)) == 6


@pytest.mark.parametrize("key", ["denoiser.class", "data.class"])
def test_other_code_of_a_class_is_another_denoiser(tmp_path, monkeypatch, key):
    """Which shapes and settings do not tell; a package that gives on what a file beside it defines is such code, too."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/__init__.py").write_text("from .parts import Ours, Denoiser\n")
    source = (ROOT / "tests/their_networks.py").read_text() + (ROOT / "tests/own_datasets.py").read_text()
    source = source.replace('        return "ours"', '        return ""')
    monkeypatch.chdir(tmp_path)
    name = "Ours" if key == "data.class" else "Denoiser"

    def stage(text: str, spec: str) -> str:
        """The name of the first stage, as a new process gives it."""
        for file in ("theirs/parts.py", "alone.py"):
            (tmp_path / file).write_text(text)
        for module in [module for module in sys.modules if module.startswith(("theirs", "sami_fast_alone"))]:
            del sys.modules[module]
        _digest.cache_clear()
        importlib.invalidate_caches()
        config = load_config(TINY, [*STAGED, f"{key}={spec}:{name}"])
        return stages.denoiser_stage(config, stages.open_dataset(config.data, 0)).name

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for spec in ("theirs", f"{tmp_path}/alone.py"):
        first = stage(source, spec)
        assert stage(source + "\n# edited\n", spec) != first
        assert stage(source, spec) == first


def test_names_of_stages_without_classes_are_what_they_were(tmp_path):
    config = tiny(tmp_path, *STAGED, "denoiser.skip_logsnr=-30")  # there was none
    assert stages.denoiser_stage(config, stages.open_dataset(config.data, 0)).name == "3da5e766d1e1"


def test_what_would_stop_the_second_stage_stops_before_the_first(tmp_path):
    train(tiny(tmp_path))
    with pytest.raises(UserError, match="holds a run already"):
        train(tiny(tmp_path, *STAGED))
    with pytest.raises(UserError, match=r"encoder, denoiser or data\.image_size"):
        train(tiny(tmp_path, "name=odd", *STAGED, "encoder.channels=[4,4,4,4,4]"))
    assert not (tmp_path / stages.DENOISERS).exists()


def test_a_denoiser_alone_has_no_report(tmp_path, capfd):
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(tiny(tmp_path, "train.mode=denoiser")))
    assert main(["--config", str(config)]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == str(tmp_path / "tiny")
    assert not (tmp_path / "tiny/report").exists()
    log = rows(tmp_path / "tiny")
    assert all(row["kl_nats"] == 0 for row in log)
    assert log[-1]["loss_nats"] < log[0]["loss_nats"]


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_kill_in_every_stage_changes_nothing(tmp_path, zero_stage):
    """SIGKILL while the denoiser learns alone, while the encoder does, and while both do; the end is the same bit for bit."""
    options = [*STAGED, "train.denoiser_steps=40", "train.steps=80", "checkpoint.every=5", f"engine.zero_stage={zero_stage}"]
    expected = train(tiny(tmp_path / "whole", *options))
    folder = tmp_path / "killed"
    written = folder / "tiny/checkpoints"
    begun = (
        lambda: any(folder.glob(f"{stages.DENOISERS}/*/checkpoints/step_5")),
        (written / "step_10").exists,
        (written / "step_50").exists,
    )
    for wanted in begun:
        process = subprocess.Popen(
            [*COMMAND, "--resume", f"runs_dir={folder}", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while not wanted():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (folder / "tiny/model").exists()
    train(tiny(folder, *options), resume=True)
    assert_same_weights(folder / "tiny", expected)
    assert [row["loss_nats"] for row in rows(folder / "tiny")] == [row["loss_nats"] for row in rows(expected)]


def test_a_denoiser_that_another_run_trains_is_waited_for(tmp_path):
    """Two runs that need the same denoiser, started together: one trains it, the other uses it."""
    options = [f"runs_dir={tmp_path}", *STAGED, "train.denoiser_steps=300"]
    both = [subprocess.Popen([*COMMAND, *options, f"name=run{n}"], stdout=subprocess.PIPE, text=True) for n in (0, 1)]
    output = "".join(process.communicate(timeout=120)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0], output
    assert_same_weights(tmp_path / "run0", tmp_path / "run1")
    (first,) = denoisers(tmp_path)
    assert [row["step"] for row in rows(first)] == list(range(1, 301))


# ---- the bank


def test_the_bank_asks_the_denoiser_once_for_each_step():
    asked = []

    def denoiser(x_t, t):
        asked.append(x_t)
        return x_t / 3

    bank, images = Bank(denoiser), torch.randn(3, 2, 1, 4, 4)
    with torch.no_grad():
        for turn in range(2):
            for step in range(3):
                bank.turn_to(step, 0)
                out = bank(images[step], torch.zeros(2))
                torch.testing.assert_close(out, images[step] / 3, rtol=1e-3, atol=1e-3)
                assert out.dtype == torch.float32
            assert len(asked) == 3, turn
        bank.turn_to(0, 1)
        bank(images[0], torch.zeros(2))
    assert len(asked) == 4
    x = images[0].requires_grad_()
    bank(x, torch.zeros(2)).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 1 / 3))


def test_a_banked_run_is_the_unbanked_one_until_images_come_again(finished):
    """Up to the rounding of what is kept; from then on the same noisy images come, with other latents."""
    folder = finished.parent
    options = [*STAGED, "train.encoder_warmup=1", "kl_weight.kind=constant"]
    banked = rows(train(tiny(folder, "name=banked", *options)))
    plain = rows(train(tiny(folder, "name=plain", *options, "train.bank_steps=0")))
    for one, other in zip(banked[:4], plain[:4], strict=True):
        assert one["unguided_nats"] == pytest.approx(other["unguided_nats"], rel=1e-3)
        assert one["kl_nats"] == pytest.approx(other["kl_nats"], rel=1e-2)
    unguided = [row["unguided_nats"] for row in banked]
    assert unguided[4:8] == unguided[:4] == unguided[8:]
    assert len({row["diffusion_nats"] for row in banked}) == 12


# ---- noise levels and minutes


class Striped(Dataset):
    """Images along one direction with a known variance, and little noise."""

    image_shape, size = (1, 4, 4), 300

    def images(self, index: torch.Tensor) -> torch.Tensor:
        direction = torch.arange(16.0) / torch.arange(16.0).norm()
        strength = 3.0 * torch.sin(index * 2 * torch.pi / 300)[:, None]
        return (5 + strength * direction + 0.01 * torch.cos(index[:, None] * torch.arange(1, 17))).view(-1, *self.image_shape)


def test_data_are_known_by_content_and_not_by_place(tmp_path):
    """A run of an earlier version, which did not write down what its files held, is not asked."""

    class Known(Dataset):
        fingerprint = "what the files hold"

    new = stages.lasting_settings(tiny(tmp_path, "data.kind=array", "data.path=here.npy", "data.range=signed"), Known(), "")
    assert new == stages.lasting_settings(tiny(tmp_path, "data.kind=array", "data.path=there.npy"), Known(), "")
    earlier = new | {"data": {**new["data"], "path": "/home/before.npy", "files": ""}}
    del earlier["data"]["range"]
    assert stages.difference(stages.as_written_now(earlier, new), new) == []
    other = new | {"data": {**new["data"], "files": "something else"}}
    assert stages.difference(stages.as_written_now(other, new), new) == ["data.files ('something else' there, 'what the files hold' here)"]


def test_the_noisiest_level_follows_from_the_spectrum():
    variances = eigenvalues(Striped())
    assert variances[0] == pytest.approx(4.5, rel=1e-3)  # half of 3^2
    assert noisiest_level(variances) == pytest.approx(-np.log(4.5) - 3, abs=0.05)
    assert cleanest_guided_level([8.0, 4.0, 0.5], 3) == pytest.approx(-np.log(0.5) + 1, abs=0.05)
    assert cleanest_guided_level([8.0, 4.0, 0.5], 16) == cleanest_guided_level([8.0, 4.0, 0.5], 3)  # of as many as there are
    assert cleanest_guided_level([8.0, 4.0, 0.0], 3) == 15.0


def test_auto_is_written_and_read_and_settled(finished):
    config = tiny(finished.parent, "name=auto", *STAGED, "schedule.logsnr_min=auto")
    assert config.schedule.logsnr_min is None
    assert "logsnr_min: auto" in to_yaml(config)
    settled = load_config(str(train(config) / "config.yaml")).schedule
    assert settled.logsnr_min == noisiest_level(eigenvalues(stages.open_dataset(config.data, 0)))
    assert settled.logsnr_max == config.schedule.logsnr_max
    beside = train(tiny(finished.parent, "name=beside", "train.mode=frozen", f"denoiser.pretrained={finished}", "schedule.logsnr_min=auto"))
    assert load_config(str(beside / "config.yaml")).schedule.logsnr_min == -7  # the given denoiser's own


PACE = Pace(denoiser=0.4, outputs=0.1, encoder=0.2, both=0.5)


@pytest.mark.parametrize(
    ("settings", "denoiser_steps", "steps"),
    [
        # 115 s are 100 s of steps
        (["train.mode=staged", "train.encoder_warmup=1"], 110, 180),  # 45 / 0.4; 55 / (0.2 + 0.1)
        (["train.mode=staged", "train.encoder_warmup=1", "train.bank_steps=100"], 110, 220),  # (55 - 100 * 0.1) / 0.2
        (["train.mode=staged", "train.encoder_warmup=1", "train.bank_steps=1000"], 110, 180),  # all of them are new
        (["train.mode=staged", "train.encoder_warmup=0.5"], 110, 130),  # 55 / (0.15 + 0.25)
        (["train.mode=joint", "train.denoiser_warmup=0.5"], 1500, 220),  # 100 / 0.45
        (["train.mode=denoiser"], 1500, 250),
        (["method=beta_vae"], 1500, 200),
    ],
)
def test_steps_that_fit_into_minutes(settings, denoiser_steps, steps):
    minutes = 100 * budget.OVERHEAD / 60
    config = budget.laid_out(load_config(None, [f"train.minutes={minutes}", *settings]), PACE)
    assert (config.train.denoiser_steps, config.train.steps) == (denoiser_steps, steps)
    stages, seconds = budget.course(config, PACE)
    assert 0.85 * minutes < seconds / 60 <= minutes + 0.05
    assert f"until {progress.hms(seconds)}" in stages[-1]


def test_too_few_minutes_are_refused():
    with pytest.raises(UserError, match=r"train\.minutes: 0\.05 minutes are 5 steps of 0\.5 s here"):
        budget.laid_out(load_config(None, ["train.minutes=0.05", "train.denoiser_warmup=0"]), PACE)


def test_a_run_of_minutes_goes_on_with_the_steps_it_began_with(tmp_path, monkeypatch):
    options = [*BY_MINUTES, "train.minutes=0.02", "checkpoint.every=20"]
    paces = iter((Pace(0.01, 0.001, 0.01, 0.02), Pace(0.001, 0.0001, 0.001, 0.002)))
    monkeypatch.setattr("sami_fast.budget.measure", lambda *arguments: next(paces))
    run = train(tiny(tmp_path, *options))
    began = load_config(str(run / "config.yaml")).train
    assert (began.minutes, began.denoiser_steps, began.steps) == (0.02, 46, 37)
    train(tiny(tmp_path, *options), resume=True)
    train(tiny(tmp_path, "name=faster", *options))  # measures another speed, and shares the denoiser all the same
    (first,) = denoisers(tmp_path)
    assert rows(first)[-1]["step"] == 46


def test_a_dry_run_says_what_will_be_when(tmp_path, capsys):
    arguments = ["--config", str(ROOT / "tests/tiny.yaml"), "--dry-run", f"runs_dir={tmp_path}", *BY_MINUTES, "train.minutes=1"]
    assert main(arguments) == 0
    course = capsys.readouterr().out.split("stages")[1].split("time ")[0].strip().splitlines()
    assert [line.split(":")[0].strip() for line in course] == ["the denoiser alone", "the encoder beside it", "both networks"]
    assert "beta halves every" in course[1]
    assert not list(tmp_path.iterdir())
