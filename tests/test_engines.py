"""One process by itself takes the steps that it takes through DeepSpeed and reads the same checkpoints, without loading it."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import TINY, assert_same_weights, largest, tiny
from safetensors.torch import load_file

from sami_fast.config import load_config
from sami_fast.engine import direct
from sami_fast.engine.base import torch_adam
from sami_fast.engine.checkpoints import WEIGHTS, list_checkpoints
from sami_fast.engine.partitions import MOMENTS
from sami_fast.errors import UserError
from sami_fast.train import Trainer, main, train

ROOT = Path(__file__).resolve().parents[1]


class OneByOne(direct.Engine):
    """With Adam on every weight by itself, as DeepSpeed has it: on one buffer the last few of a weight are computed as the others are, and
    may differ in the last bit."""

    def __init__(self, step, networks, config):
        super().__init__(step, networks, config)
        groups = [{"params": [p for p in network.parameters() if p.requires_grad], "name": name} for name, network in networks.items()]
        self.optimizer = torch_adam([group for group in groups if group["params"]], config.optimizer)

    def _moment(self, name, moment):
        return self.optimizer.state[self._trained[name]][moment]


def kept(run: Path) -> dict[str, torch.Tensor]:
    """All that the last checkpoint keeps: weights, Adam's moments, averages."""
    return load_file(list_checkpoints(run / "checkpoints")[0] / WEIGHTS)


def runs_of(folder: Path, *overrides: str) -> dict[str, Path]:
    """The same run through DeepSpeed, by itself, and by itself with Adam one by one."""
    made = {kind: train(tiny(folder, *overrides, f"name={kind}", f"engine.kind={kind}")) for kind in ("deepspeed", "direct")}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(direct, "Engine", OneByOne)
        return made | {"one by one": train(tiny(folder, *overrides, "name=one_by_one"))}


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    return runs_of(tmp_path_factory.mktemp("joint"), "optimizer.clip=0")


def assert_same_bits(run: Path, expected: Path) -> None:
    found, wanted = kept(run), kept(expected)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), f"{name}: off by {(found[name] - value).abs().max()}"


def assert_close(run: Path, expected: Path) -> None:
    """To float32 rounding; of moments, on the scale of all of them, since some gradients are 0 but for rounding."""
    found, wanted = kept(run), kept(expected)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        kind = name.partition("/")[2]
        floor = 2e-6 * largest(v for other, v in wanted.items() if other.endswith(f"/{kind}")) if kind in MOMENTS else 0.0
        assert (found[name] - value).abs().max() <= 5e-6 * value.abs().max() + floor, name


def test_a_joint_run(joint):
    assert_same_bits(joint["one by one"], joint["deepspeed"])
    assert_close(joint["direct"], joint["deepspeed"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["engine.gradient_accumulation=4", "objective.noise_levels=2", "objective.free_bits=0.1"],
        ["optimizer.kind=adamw", "optimizer.weight_decay=0.1", "optimizer.ema_decay=0", "optimizer.encoder_lr=0.01"],
        ["optimizer.weight_decay=0.1", "engine.precision=bf16"],  # moments of an encoder that only decays, before it learns
        ["method=beta_vae"],
        ["engine.checkpoint_activations=true", "optimizer.clip=1000000"],  # a limit that nothing comes near
    ],
    ids=lambda overrides: overrides[0],
)
def test_other_runs(overrides, tmp_path):
    made = runs_of(tmp_path, "optimizer.clip=0", "train.steps=6", *overrides)
    assert_same_bits(made["one by one"], made["deepspeed"])
    assert_close(made["direct"], made["deepspeed"])


@pytest.mark.parametrize("mode", ["frozen", "finetune"])
def test_an_encoder_beside_a_trained_denoiser(mode, joint, tmp_path):
    """Its phases, and weights that never learn."""
    options = [f"train.mode={mode}", f"denoiser.pretrained={joint['deepspeed']}", "train.bank_steps=3"]
    made = runs_of(tmp_path, "optimizer.clip=0", "train.steps=6", *options)
    assert_same_bits(made["one by one"], made["deepspeed"])
    assert_close(made["direct"], made["deepspeed"])
    assert any(name.startswith("denoiser.") for name in kept(made["direct"])) == (mode == "finetune")


def test_clipping_shrinks_alike(joint, tmp_path):
    """The norm is summed in another order."""
    made = runs_of(tmp_path, "optimizer.clip=0.5")
    for kind in ("direct", "one by one"):
        assert_close(made[kind], made["deepspeed"])
    shrunk, whole = kept(made["direct"]), kept(joint["direct"])
    assert (shrunk["denoiser.out.weight/exp_avg"] - whole["denoiser.out.weight/exp_avg"]).abs().max() > 1e-3


@pytest.mark.parametrize(("begun", "goes_on"), [("direct", "deepspeed"), ("deepspeed", "direct"), ("direct", "direct")])
def test_checkpoints_of_one_are_read_by_the_other(begun, goes_on, joint, tmp_path):
    run = shutil.copytree(joint[begun], tmp_path / "tiny")
    shutil.rmtree(run / "checkpoints/step_12")
    shutil.rmtree(run / "model")
    resumed = train(tiny(tmp_path, "optimizer.clip=0", f"engine.kind={goes_on}"), resume=True)
    assert_close(resumed, joint[begun])
    if begun == goes_on:
        assert_same_bits(resumed, joint[begun])
        assert_same_weights(resumed, joint[begun])


def test_weights_keep_their_layout_and_begin_where_kernels_want_them(tmp_path):
    trainer = Trainer(tiny(tmp_path), resume=False, overwrite=False)
    stem = trainer.model.denoiser.stem.weight
    stem.data = stem.detach().to(memory_format=torch.channels_last)
    before = {name: (p.stride(), p.detach().clone()) for name, p in trainer.model.named_parameters()}
    engine = direct.Engine(trainer.module, trainer.model.networks, trainer.config)
    for name, p in trainer.model.named_parameters():
        assert p.stride() == p.grad.stride() == before[name][0], name
        assert torch.equal(p, before[name][1]), name
        assert p.data_ptr() % direct.LINE == p.grad.data_ptr() % direct.LINE == 0, name
    for step in range(2):  # the first one moves the last layer alone, whose weights are 0
        engine.update(step, lambda micro: trainer._losses(micro, 0.0, "denoiser"))
    assert not torch.equal(stem, before["denoiser.stem.weight"][1])  # a view that the optimiser reaches
    trainer.feed.close()


def test_a_captured_step_hands_its_gradients_over(tmp_path):
    """The same as those of a loss; what has none stays."""
    config = tiny(tmp_path, "engine.gradient_accumulation=2", "optimizer.clip=0")
    plain = Trainer(replace(config, name="plain", engine=replace(config.engine, capture="off")), resume=False, overwrite=False)
    captured = Trainer(config, resume=False, overwrite=False)
    captured.module.captured.wait = 0
    for trainer, count in ((plain, 2), (captured, 3)):
        assert len(trainer._losses(0, 0.1, "denoiser")) == count
        trainer.engine.update(0, lambda micro: trainer._losses(micro, 0.1, "denoiser"))  # noqa: B023 (called at once)
    for (name, one), two in zip(plain.model.named_parameters(), captured.model.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-5, atol=1e-7, msg=name)
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-7, msg=name)
    assert captured.model.denoiser.out.weight.grad.any()
    assert not any(p.grad.any() for p in captured.model.encoder.parameters())


@pytest.mark.parametrize("launched", [False, True])
def test_one_process_loads_no_deepspeed(launched, tmp_path):
    """Trained to the end, with every monitor that writes files; by itself, or as a launcher starts it."""
    arguments = ["--config", TINY, f"runs_dir={tmp_path}", "--no-report", "train.steps=5", "log.tensorboard=true", "log.csv=true"]
    code = f"import sys; from sami_fast.train import main; s = main({arguments!r}); print('deepspeed' in sys.modules); sys.exit(s)"
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"} if launched else {}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | place, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (["engine.zero_stage=1"], "found zero_stage 1"),
        (["optimizer.implementation=apex"], "found implementation apex"),
    ],
)
def test_what_needs_deepspeed_is_not_asked_of_one_process_alone(overrides, fragment):
    assert load_config(TINY, overrides).direct(1) is False
    with pytest.raises(UserError, match=r"engine\.kind: direct needs engine\.zero_stage 0 and optimizer\.implementation torch") as caught:
        load_config(TINY, [*overrides, "engine.kind=direct"])
    assert fragment in str(caught.value)


def test_direct_is_for_one_process(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--config", TINY, "engine.kind=direct", "--dry-run"]) == 2
    assert capsys.readouterr().err == "sami-fast: engine.kind: direct is for one process, found 2; use auto\n"
    assert not load_config(TINY, []).direct(2)
    assert load_config(TINY, []).direct(1)
    assert not load_config(TINY, ["engine.kind=deepspeed"]).direct(1)
