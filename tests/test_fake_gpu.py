"""One whole step of every config that comes with the package, on CUDA tensors that hold no data: no operator meets tensors of two devices,
nothing on the way waits for the GPU, and every convolution finds its channels innermost in memory."""

import re

import pytest
from fake_gpu import missing, watched

from benchmarks.budgets import refusals
from sami_fast.config import builtin_configs

REASON = missing() or refusals().get("gpu")
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.timeout(1500)]
UNET = {
    **{"sample_size": 256, "block_out_channels": (32, 32, 64), "layers_per_block": 1, "attention_head_dim": 32},
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
}


def test_a_step_of_every_config(tmp_path):
    """By the engine, with its update, and as it is captured; in each phase that the config trains in."""
    jobs = []
    for file in sorted(builtin_configs().glob("*.yaml")):
        text, settings = file.read_text(), []
        if re.search("kind: (celeba|image_folder|video_folder|array)$", text, re.MULTILINE):
            settings.append("data.path=not there")
        if "sami:" in text:  # auto asks the data, which are not there
            settings.append("sami.logsnr_max=0")
        if "kind: array" in text:
            settings += ["data.image_size=32", "data.channels=3"]
        if re.search("pretrained: ", text):  # the same kinds of layers, in small
            diffusers = pytest.importorskip("diffusers")
            diffusers.UNet2DModel(**UNET).save_pretrained(tmp_path)
            diffusers.DDPMScheduler().save_pretrained(tmp_path)
            settings.append(f"denoiser.pretrained={tmp_path}")
        jobs.append({"config": file.stem, "settings": settings, "fault": ""})
    found = watched(jobs)
    assert {config for config, *_ in found} == {job["config"] for job in jobs}
    assert {phase for _, _, phase, *_ in found} == {"denoiser", "encoder", "both"}
    for config, _, phase, how, counts, words in found:
        # A UNet of diffusers keeps its own order of axes, in weights and in images.
        assert words.keys() == ({"convolution with channels outermost"} if config == "celebahq256" else set()), (config, phase, how, words)
        assert counts["convolutions"] >= 20, (config, phase, how)
        normed = "style: silu" not in (builtin_configs() / f"{config}.yaml").read_text()  # norms are most of an encoder's launches
        fewest = 20 if normed or phase != "encoder" else 5
        assert counts["launches"] >= fewest, (config, phase, how)


SMALL = [
    *("data.path=not there", "data.image_size=16", "train.batch_size=16", "train.denoiser_warmup=0"),
    *("encoder.channels=[32,64]", "denoiser.channels=[32,64]", "denoiser.attention=[8]", "denoiser.blocks=1"),
]
PLANTED = {
    "made on the CPU": "expected all tensors to be on the same device",
    "a number on the CPU": "mul on the cpu",
    "sent to the GPU": "_to_copy on the cpu",
    "sent to the CPU": "_to_copy on the cpu",
    "read": "_local_scalar_dense",
    "asked": "_local_scalar_dense",
    "chosen": "nonzero",
    "weights as in files": "convolution with channels outermost",
    "images as in files": "convolution with channels outermost",
}


def test_planted_faults_are_found():
    found = watched([{"config": "celeba64", "settings": SMALL, "fault": fault} for fault in PLANTED])
    assert {(fault, how) for _, fault, _, how, *_ in found} == {(fault, how) for fault in PLANTED for how in ("plain", "captured")}
    for _, fault, phase, how, _, words in found:
        assert any(PLANTED[fault] in word.lower() for word in words), (fault, phase, how, words)
