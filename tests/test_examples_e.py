"""The notebook runs from its first cell to its last, and the index names the examples that there are."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sami_fast import Axes

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "folder_to_axes.ipynb"


def cells() -> list[tuple[str, list[str]]]:
    """Source and tags of the notebook's cells of code."""
    found = json.loads(NOTEBOOK.read_text())["cells"]
    return [("".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in found if cell["cell_type"] == "code"]


def test_index_of_examples():
    """No example lacks its line."""
    lines = set(re.findall(r"^\| `([\w.]+)` \|", (EXAMPLES / "README.md").read_text(), re.MULTILINE))
    assert lines >= {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}


def test_the_notebook_is_kept_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
    assert NOTEBOOK.stat().st_size < 200_000


@pytest.mark.parametrize("trained", [False, True], ids=["trains", "goes on from a trained model"])
def test_notebook(trained, tmp_path, monkeypatch):
    """Every cell, in order and in one namespace, as a notebook's kernel does. It has no magics, so Python alone runs it.

    Twice: once it trains for two steps, as far as the axes, which such a model has none of; once it finds a trained model where its own
    would be, tests/disks_model.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if trained:
        shutil.copytree(ROOT / "tests/disks_model", tmp_path / "runs/photos/model")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, (source, tags) in enumerate(cells()):
        if not trained and "discover(" in source:
            break
        exec(compile(source, f"{NOTEBOOK.name}, code cell {number}", "exec"), namespace)
        if "parameters" in tags:
            namespace |= {"steps": 2, "denoiser_steps": 2}
    model, images = namespace["model"], namespace["images"]
    assert len(list((tmp_path / "photos").iterdir())) == 2000
    assert images.shape[1:] == model.image_shape == (1, 16, 16)
    if not trained:
        assert (tmp_path / "runs/photos/model/model.safetensors").is_file()
        return
    assert (namespace["information"] > 0.05).sum() == 3
    axes = Axes.load(tmp_path / "axes.npz")
    assert axes.names == ("across", "down", "ground")
    known = np.stack([brightest(image[0].numpy()) for image in images])  # [N, 2]: row and column of the disk
    r = np.abs(np.corrcoef(namespace["places"].numpy().T, known.T)[:3, 3:])
    assert min(r[0, 1], r[1, 0]) > 0.9, r  # across is the column, down the row
    edited = namespace["edited"]
    assert edited.shape == (3, 3, 1, 16, 16)
    same = (edited[:, 1] - images[:3]).abs().mean()
    assert same < 0.1
    assert (edited[:, 2] - images[:3]).abs().mean() > 1.5 * same


def brightest(pixels: np.ndarray) -> np.ndarray:
    """Centre of the brighter half of the range of an image, as row and column."""
    bright = pixels > (pixels.min() + pixels.max()) / 2
    return np.argwhere(bright).mean(0)
