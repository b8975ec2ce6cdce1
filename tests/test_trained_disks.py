"""What the probabilities of a trained model say about its axes, without labels.

disks_model/ is the model of `python sami_fast/train.py --config disks_joint seed=0`, its weights rounded to 16 bits: a run whose latents of
y and background came out tilted into each other.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group

from sami_fast.config import load_config
from sami_fast.data import open_dataset
from sami_fast.latents.discovery import discover
from sami_fast.latents.sampling import encode
from sami_fast.methods.sami import Sami
from sami_fast.metrics.identifiability import correlation_matrix, linear_r2, mcc
from sami_fast.metrics.latents import information_per_dim, live_dims
from sami_fast.metrics.scale_profile import half_point, scale_profile

IMAGES = 1500
COARSE_TO_FINE = ["x", "background", "y"]  # by the energy of their pixels: 44.2, 15.5, 6.2


@pytest.fixture(scope="module")
def disks():
    return open_dataset(load_config("disks").data, seed=0, split=1)


@pytest.fixture(scope="module")
def factors(disks):
    return disks.factors(torch.arange(IMAGES)).double().numpy()


@pytest.fixture(scope="module")
def sami():
    return Sami.from_pretrained(Path(__file__).parent / "disks_model")


class Rotated(torch.nn.Module):
    """An encoder whose live latents are turned by a random rotation: as good a code of the same images, but with other axes."""

    def __init__(self, encoder, live, seed):
        super().__init__()
        self.encoder, self.image_shape, self.latent_size = encoder, encoder.image_shape, encoder.latent_size
        turn = np.eye(encoder.latent_size)
        turn[np.ix_(live, live)] = ortho_group.rvs(len(live), random_state=seed)
        self.turn = torch.from_numpy(turn).float()

    def forward(self, x):
        mu, var = self.encoder(x)
        return mu @ self.turn.T, var @ self.turn.square().T


@pytest.fixture(scope="module")
def rotated(sami, disks):
    posterior = encode(sami, disks.images(torch.arange(IMAGES)))
    live = live_dims(information_per_dim(posterior.mu.numpy(), posterior.var.numpy()))
    assert len(live) == 3
    return Sami(Rotated(sami.encoder, live, seed=1), sami.denoiser, sami.schedule)


@pytest.fixture(scope="module")
def found(rotated, disks):
    """Axes by method; few images and draws, for time."""
    axes = discover(rotated, disks.images, 96, encoded=IMAGES, draws=2, num_steps=24, seed=0)
    return {d.method: d for d in axes if d.method != "level"}


def recovered(discovered, model, disks, factors):
    coordinates = discovered.axes.coordinates(encode(model, disks.images(torch.arange(IMAGES))).mu.numpy())
    return coordinates, mcc(coordinates, factors)[0]


def test_the_model_holds_the_factors(sami, disks, factors):
    posterior = encode(sami, disks.images(torch.arange(IMAGES)))
    z = posterior.draw(torch.arange(IMAGES), 0).numpy()
    assert linear_r2(z, factors).min() > 0.98
    assert mcc(z, factors)[0] > 0.95


def test_the_information_profile_orders_the_factors(sami, disks, factors):
    """A factor with more energy reaches one nat at a noisier level."""
    profile = scale_profile(sami, disks.images, IMAGES, logsnr=np.linspace(-7, 5, 13), seed=0)
    mu = encode(sami, disks.images(torch.arange(IMAGES))).mu.numpy()
    latent_of = correlation_matrix(mu, factors).argmax(1)
    one_nat = [half_point(profile.logsnr, profile.information[:, d], 2.0) for d in latent_of]
    assert [disks.factor_names[k] for k in np.argsort(one_nat)] == COARSE_TO_FINE
    assert np.diff(np.sort(one_nat)).min() > 0.2
    dead = np.delete(np.arange(sami.latent_size), latent_of)
    assert np.isnan(profile.scale[dead]).all()
    assert np.isfinite(profile.scale[latent_of]).all()


def test_discovered_axes_order_the_factors(found, rotated, disks, factors):
    coordinates, _ = recovered(found["scale"], rotated, disks, factors)
    factor_of = correlation_matrix(coordinates, factors).argmax(0)
    assert [disks.factor_names[k] for k in factor_of] == COARSE_TO_FINE


@pytest.mark.parametrize("method", ["scale", "ica", "gradient"])
def test_discovered_axes_undo_a_rotation(found, rotated, sami, disks, factors, method):
    """They find the factors again, and better than the latents that training left."""
    images = disks.images(torch.arange(IMAGES))
    turned, trained = (mcc(encode(model, images).mu.numpy(), factors)[0] for model in (rotated, sami))
    _, discovered = recovered(found[method], rotated, disks, factors)
    assert turned < 0.85
    assert discovered > trained > 0.95
    assert discovered > 0.98
