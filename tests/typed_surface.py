"""The public surface as a type checker sees it: never run, but read by `make lint` and by test_surface.py."""

from pathlib import Path
from typing import assert_type

import numpy as np
from torch import Tensor

import sami_fast
from sami_fast.accelerate import Report
from sami_fast.methods import LatentModel, Posterior


def use(images: Tensor, report: Report) -> None:
    model = sami_fast.load_model("runs/disks", "cuda", revision="main", variant="fp16")
    assert_type(model, LatentModel)
    assert_type(sami_fast.Sami.from_pretrained("runs/disks"), sami_fast.Sami)
    assert_type(model.encode(images), Posterior)
    assert_type(model.encode(np.zeros((8, 8), np.uint8)).mu, Tensor)
    assert_type(sami_fast.sample(model, 4, seed=0, num_steps=10), Tensor)
    assert_type(sami_fast.reconstruct(model, images, seed=0), Tensor)
    assert_type(sami_fast.traverse(model, images[:1], 0, [-1.0, 1.0], seed=0), Tensor)
    assert_type(sami_fast.edit(model, images, 0, [0.5]), Tensor)
    assert_type(sami_fast.interpolate(model, images[:1], images[1:], 3), Tensor)
    assert_type(sami_fast.Axes.load("axes.npz"), sami_fast.Axes)
    assert_type(sami_fast.train(sami_fast.load_config("disks", ["train.steps=50"])), Path)
    assert_type(sami_fast.load_config(), sami_fast.Config)
    assert_type(sami_fast.accelerate(model), Report)
    assert_type(sami_fast.ops.conv2d(images, images), Tensor)
    with sami_fast.use_backend("reference"):
        raise sami_fast.UserError(sami_fast.__version__)
