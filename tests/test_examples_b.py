"""The example of networks of one's own trains by the command that it prints."""

import ast
from pathlib import Path

from helpers import rows

from sami_fast.config import load_config
from sami_fast.methods.registry import load_model
from sami_fast.train import main

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples/own_networks.py"


def test_own_networks(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    few = ["train.steps=4", "train.batch_size=4", "log.every=1", "log.tensorboard=false", f"runs_dir={tmp_path}"]
    assert main(["--config", "examples/own_networks.yaml", "--no-report", *few]) == 0
    assert len(rows(tmp_path / "own_networks")) == 4
    model = load_model(tmp_path / "own_networks", trust_remote_code=True)
    assert model.latent_size == load_config("examples/own_networks.yaml").encoder.latent_size
    classes = [node for node in ast.parse(EXAMPLE.read_text()).body if isinstance(node, ast.ClassDef)]
    assert sum((node.end_lineno or 0) - node.lineno + 1 for node in classes) <= 30
