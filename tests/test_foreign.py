"""Networks that other people wrote, from a config to a report by the real commands: those of benchmarks/foreign.py, and with two ranks."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import TINY, assert_same_gradients, gradients, rows, tiny
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.foreign import PAIRS
from sami_fast import cli, ops
from sami_fast.adapters import construct
from sami_fast.config import load_config
from sami_fast.methods.build import build_model
from sami_fast.methods.registry import load_model
from sami_fast.reference.step import step as reference_step
from sami_fast.schedule import alpha_sigma
from sami_fast.step import Draw, Objective, noised, training_step
from sami_fast.train import train

ROOT = Path(__file__).resolve().parents[1]
THEIRS = Path(__file__).resolve().with_name("their_networks.py")
SHAPE = (1, 16, 16)
UNET = {
    **{"sample_size": 16, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4},
    **{"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "attention_head_dim": 8},
}
# How a config names the pairs of benchmarks/foreign.py, at sizes that train in seconds.
NETWORKS: dict[str, dict[str, dict]] = {
    "port": {
        "encoder": {"class": "benchmarks.foreign:PortEncoder", "kwargs": {"channels": 1, "size": 16, "latents": 4, "width": 8}},
        "denoiser": {"class": "benchmarks.foreign:PortDenoiser", "kwargs": {"channels": 1, "width": 8}},
    },
    "autoencoder": {
        "encoder": {"class": "benchmarks.foreign:SemanticEncoder", "kwargs": {"channels": 1, "latents": 4, "width": 8}},
        "denoiser": {"class": "benchmarks.foreign:AutoencoderDenoiser", "kwargs": {"channels": 1, "width": 8}},
    },
    "lucidrains": {
        "encoder": {"class": "benchmarks.foreign:TimmResNet", "kwargs": {"channels": 1, "latents": 4}},
        "denoiser": {"class": "denoising_diffusion_pytorch:Unet", "kwargs": {"dim": 8, "dim_mults": [1, 2], "channels": 1}},
    },
    "diffusers": {
        "encoder": {
            "class": "benchmarks.foreign:TimmViT",
            "kwargs": {"channels": 1, "size": 16, "latents": 4, "embed_dim": 24, "depth": 2, "num_heads": 2},
            "accelerate": True,
        },
        "denoiser": {"class": "diffusers:UNet2DModel", "kwargs": UNET},
    },
}


def config_of(pair: str) -> dict:
    """The config of a pair, with the conventions that benchmarks/foreign.py states."""
    stated = PAIRS[pair]
    if missing := [name for name in stated.needs if find_spec(name) is None]:
        pytest.skip(f"needs {' and '.join(missing)}")
    tiny_run = yaml.safe_load(Path(TINY).read_text())
    networks = {name: dict(settings) for name, settings in NETWORKS[pair].items()}
    networks["encoder"]["returns"] = stated.returns
    networks["denoiser"] |= {"time": stated.time, "predicts": stated.predicts}
    return {
        **tiny_run,
        **networks,
        "name": pair,
        "data": {"image_size": 16},
        "train": {"steps": 6, "batch_size": 8, "denoiser_warmup": 0.2},
    }


def launch(folder: Path, ranks: int, *arguments: str | Path) -> subprocess.CompletedProcess:
    """The real training command, standing in the root of the repository."""
    launcher = Path(sys.executable).parent / "deepspeed"
    port = str(29900 + os.getpid() % 90)
    command = [launcher, "-q", "--num_accelerators", str(ranks), "--master_port", port, ROOT / "sami_fast/train.py", *arguments]
    environment = os.environ | {"PATH": f"{launcher.parent}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    return subprocess.run([*command, f"runs_dir={folder}"], cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("pair", PAIRS)
def test_from_a_config_to_a_report(pair, tmp_path, monkeypatch, capsys):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config_of(pair)))
    report = [] if pair == "port" else ["--no-report"]  # one that ends with it is enough; the command is below
    done = launch(tmp_path, 1, "--config", tmp_path / "run.yaml", *report)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = tmp_path / pair
    assert len(rows(run)) == 6
    assert (run / "report/index.html").exists() == (pair == "port")
    monkeypatch.chdir(ROOT)
    model = load_model(run, trust_remote_code=True)
    assert model.image_shape == SHAPE
    assert model.latent_size == 4
    assert type(model.networks["encoder"].network).__name__ == NETWORKS[pair]["encoder"]["class"].partition(":")[2]
    for command in (
        ["encode", str(run), "--output", str(tmp_path / "codes.npz")],
        ["traverse", str(run), "--axis", "0", "--steps", "2", "--output", str(tmp_path / "along.png")],
        ["report", str(run)],
        ["evaluate", str(run), "--images", "32", "--no-baselines"],
    ):
        assert cli.main(command) == 2
        assert "code that would be imported; if you trust it, add --trust" in capsys.readouterr().err
        assert cli.main([*command, "--trust"]) == 0, capsys.readouterr().err
    assert json.loads((run / "report/metrics.json").read_text())["steps"] == 6
    with np.load(tmp_path / "codes.npz") as codes:
        assert codes["mu"].shape == codes["var"].shape == (64, 4)
        assert (codes["var"] > 0).all()


@pytest.mark.parametrize("pair", PAIRS)
def test_loss_and_gradients_are_those_of_plain_autograd(pair, tmp_path, monkeypatch):
    """Against the networks as they are, without adapters and `accelerate`, in float64."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config_of(pair)))
    config = load_config(str(tmp_path / "run.yaml"))
    model = build_model(config, SHAPE).double()
    assert model.architecture is not None
    plain: dict[str, nn.Module] = {}
    for name, network in model.networks.items():
        plain[name] = construct(name, model.architecture[name] | {"accelerate": False}).double().eval()
        plain[name].load_state_dict(network.network.state_dict())
    if pair == "lucidrains":  # its embedding of the time is float32, whatever the rest is
        for unet in (plain["denoiser"], model.denoiser.network):
            unet.time_mlp[0].register_forward_hook(lambda module, given, found: found.double())
    with torch.no_grad():  # last layers that begin at zero would hide what is behind them
        for parameter in plain["denoiser"].parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        model.denoiser.network.load_state_dict(plain["denoiser"].state_dict())
    schedule, draw, objective = model.schedule, Draw(1, 2, torch.arange(3), 3), Objective()
    x_0 = 2 * torch.rand(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1
    loss, _ = training_step(model.encoder, model.denoiser, schedule, x_0, draw, objective, 0.3)
    found = gradients(loss, *(model.networks[name].network for name in ("encoder", "denoiser")))

    def plain_encoder(x: Tensor) -> tuple[Tensor, Tensor]:
        given = plain["encoder"](x)
        if pair == "diffusers":
            return given.base_dist.loc, given.base_dist.scale**2
        mu, spread = given if isinstance(given, tuple) else given.chunk(2, 1)
        return mu, spread**2 if pair == "autoencoder" else spread.exp()

    def plain_denoiser(x: Tensor, t: Tensor) -> Tensor:
        logsnr = schedule.logsnr(t)
        timestep = (model.denoiser.levels[None] - logsnr[:, None]).abs().argmin(1) if pair != "port" else None
        a, s = (v.view(-1, 1, 1, 1) for v in alpha_sigma(logsnr))
        given = plain["denoiser"](x, t if timestep is None else timestep)
        given = given.sample if pair == "diffusers" else given
        return s * x + a * given if pair == "autoencoder" else given

    t = schedule.sample(draw.index, 1, 3, seed=1, step=2).double()
    _, eps, _, _, _ = noised(schedule, x_0, draw, objective, True)
    eps_z = ops.random_normal(1, 2, ops.Stream.EPS_Z, draw.index, 4).double()
    weight = schedule.weight(t, objective.weighting)
    with sdpa_kernel(SDPBackend.MATH):
        expected = reference_step(plain_encoder, plain_denoiser, x_0, t, schedule.logsnr(t), weight, eps[:, None], eps_z, 0.3)
        wanted = gradients(expected, plain["encoder"], plain["denoiser"])
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    assert_same_gradients(found, wanted, 1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_equal_one(stage, tmp_path):
    """Also a network with a norm over the batch, which is in evaluation mode, and weights that no gradient reaches."""
    networks = [
        *(f"encoder.class={THEIRS}:IdleEncoder", "encoder.returns=mu_logvar"),
        *(f"denoiser.class={THEIRS}:SteppedDenoiser", "denoiser.time=timestep"),
    ]
    one = train(tiny(tmp_path / "one", *networks, f"engine.zero_stage={stage}"))
    done = launch(tmp_path, 2, "--config", TINY, "--no-report", *networks, f"engine.zero_stage={stage}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found, wanted = ([row["loss_nats"] for row in rows(run)] for run in (tmp_path / "tiny", one))
    np.testing.assert_allclose(found, wanted, rtol=5e-5)
    first, second = (load_model(run, trust_remote_code=True).state_dict() for run in (tmp_path / "tiny", one))
    for name, value in second.items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=2e-6)
