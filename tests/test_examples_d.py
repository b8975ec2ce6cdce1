"""The example of a diffusers checkpoint runs as its first lines say."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import sami_fast

ROOT = Path(__file__).resolve().parents[1]


def test_a_diffusers_checkpoint(tmp_path):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    short = ["train.steps=4", "encoder.channels=[8,8]", "checkpoint.validation_images=8", "engine.threads=1"]
    command = [sys.executable, str(ROOT / "examples/diffusers_checkpoint.py"), "--output", str(tmp_path), *short]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([4, " in done.stdout
    with Image.open(tmp_path / "traversal.png") as picture:
        assert picture.size[0] > 3 * 16
    assert {file.name for file in (tmp_path / "shared").iterdir()} == {"README.md", "config.json", "model.fp16.safetensors"}
    trained, shared = sami_fast.load_model(tmp_path / "beside_diffusers"), sami_fast.load_model(tmp_path / "shared", variant="fp16")
    rounded = trained.half().float().state_dict()
    assert all((value == rounded[name]).all() for name, value in shared.state_dict().items())
    assert sami_fast.Sami.from_pretrained(tmp_path / "beside_diffusers").image_shape == (1, 16, 16)
