"""The baselines: their losses against plain formulas, their training through train.py, saving and loading."""

import math

import pytest
import torch
from helpers import gradients, normal

from sami_fast import ops
from sami_fast.capabilities import CAPABILITIES
from sami_fast.config import load_config
from sami_fast.errors import UserError
from sami_fast.methods.baselines import BetaVAE, DiffAE
from sami_fast.methods.build import build_model
from sami_fast.methods.registry import METHODS, load_model
from sami_fast.methods.sami import Sami
from sami_fast.schedule import alpha_sigma
from sami_fast.step import Draw, Objective
from sami_fast.train import Trainer, train

SCHEDULE = {"kind": "uniform_logsnr", "logsnr_min": -6.0, "logsnr_max": 5.0}
IMAGE = {"image_channels": 1, "image_size": 8}
ENCODER = IMAGE | {"latent_size": 3, "channels": [4, 6], "groups": 2}
PARTNER = IMAGE | {"latent_size": 3, "channels": [4, 6], "groups": 2}


def draw(count: int, step: int = 5) -> Draw:
    return Draw(seed=1, step=step, index=torch.arange(count), global_batch=count)


def beta_vae(decoder_std: float) -> BetaVAE:
    torch.manual_seed(0)
    return BetaVAE.build({"encoder": ENCODER, "decoder": PARTNER}, SCHEDULE, decoder_std=decoder_std).double()


def diffae(stochastic: bool) -> DiffAE:
    torch.manual_seed(0)
    model = DiffAE.build(
        {"encoder": ENCODER, "denoiser": PARTNER | {"embedding_size": 8, "skip_logsnr": -5.0}}, SCHEDULE, stochastic=stochastic
    ).double()
    torch.nn.init.normal_(model.denoiser.out.weight, std=0.2)
    return model


def latents(model, x_0):
    """z and KL from torch's own Gaussians, with the step's noise."""
    mu, var = model.encoder(x_0)
    eps_z = ops.random_normal(1, 5, ops.Stream.EPS_Z, torch.arange(len(x_0)), 3).double()
    posterior = torch.distributions.Normal(mu, var.sqrt())
    return mu + var.sqrt() * eps_z, torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0))


@pytest.mark.parametrize("decoder_std", [1.0, 0.3])
def test_beta_vae_loss_is_the_negative_elbo_but_for_a_constant(decoder_std):
    model, x_0 = beta_vae(decoder_std), normal(5, 1, 8, 8)
    loss, (reconstruction,), (kl, *posterior) = model.training_loss(x_0, draw(5), 0.7, model.parts())
    z, expected_kl = latents(model, x_0)
    density = torch.distributions.Normal(model.decode(z), decoder_std).log_prob(x_0).flatten(1).sum(1)
    constant = 64 * math.log(decoder_std * math.sqrt(2 * math.pi))
    torch.testing.assert_close(loss, (-density - constant).mean() + 0.7 * expected_kl.sum(1).mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(reconstruction, (-density - constant).detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(kl, expected_kl.detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(tuple(posterior), tuple(head.detach() for head in model.encoder(x_0)), rtol=0, atol=0)
    assert all(g.abs().max() > 0 for name, g in gradients(loss, model).items() if not name.endswith("embed.bias"))


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("stochastic", [False, True])
def test_diffae_loss_is_the_denoising_loss_of_a_denoiser_that_knows_z(stochastic, levels):
    model, x_0, objective = diffae(stochastic), normal(4, 1, 8, 8), Objective(noise_levels=levels)
    loss, (diffusion,), (kl, *posterior) = model.training_loss(x_0, draw(4), 0.7, model.parts(objective=objective))
    mu, _ = model.encoder(x_0)
    z, expected_kl = latents(model, x_0) if stochastic else (mu, torch.zeros_like(mu))
    t = model.schedule.sample(torch.arange(4), levels, 4, seed=1, step=5).double()
    alpha_t, sigma_t = alpha_sigma(model.schedule.logsnr(t))
    x_t, eps = ops.noise_sample(x_0, alpha_t, sigma_t, torch.arange(4), seed=1, step=5)
    error = (eps - model.denoiser(x_t, t.flatten(), z.repeat_interleave(levels, 0))).square().flatten(1).sum(1)
    span = SCHEDULE["logsnr_max"] - SCHEDULE["logsnr_min"]  # uniform in logsnr: the slope of t
    expected = (0.5 * span * error).view(4, levels).mean(1)
    torch.testing.assert_close(diffusion, expected.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(loss, expected.mean() + 0.7 * expected_kl.sum(1).mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(kl, expected_kl.detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(tuple(posterior), tuple(head.detach() for head in model.encoder(x_0)), rtol=0, atol=0)
    found = gradients(loss, model)
    assert (found["0.encoder.raw_var.weight"].abs().max() > 0) == stochastic
    assert found["0.encoder.mu.weight"].abs().max() > 0


def test_the_denoiser_without_latents_is_the_one_it_always_was():
    torch.manual_seed(0)
    plain = Sami.build({"encoder": ENCODER, "denoiser": IMAGE | {"channels": [4, 6], "groups": 2, "embedding_size": 8}}, SCHEDULE)
    assert not any("embed_z" in name for name in plain.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_trained_saved_and_loaded(tmp_path, method):
    folder = train(load_config("tests/tiny.yaml", [f"method={method}", f"runs_dir={tmp_path}"]))
    model = load_model(folder)
    assert model.method == method
    assert model.deterministic == (method == "diffae")
    x = normal(2, 1, 8, 8, dtype=torch.float32)
    posterior = model.encode(x)
    assert posterior.mu.shape == (2, 4)
    assert (posterior.var == 0).all() == model.deterministic
    if method != "sami":
        with pytest.raises(UserError, match=f"expected a model of method sami, found {method}"):
            Sami.from_pretrained(folder)


@pytest.mark.parametrize("method", ["beta_vae", "diffae"])
def test_resumed_equals_uninterrupted(tmp_path, method, monkeypatch):
    common = [f"method={method}", f"runs_dir={tmp_path}"]
    whole = load_model(train(load_config("tests/tiny.yaml", [*common, "name=whole"]))).state_dict()
    config = load_config("tests/tiny.yaml", [*common, "name=cut"])
    cut = Trainer(config, resume=False, overwrite=False)
    losses = cut._losses

    def interrupted(micro, kl_weight, joint):
        if cut.step == 7:
            raise KeyboardInterrupt
        return losses(micro, kl_weight, joint)

    monkeypatch.setattr(cut, "_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    resumed = load_model(train(config, resume=True)).state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_config_knows_every_method():
    assert CAPABILITIES.keys() == METHODS.keys()


def test_a_baseline_has_no_warm_up_and_no_frozen_mode():
    assert load_config("tests/tiny.yaml", ["method=diffae"]).first_joint_step == 0
    assert load_config("tests/tiny.yaml").first_joint_step > 0
    with pytest.raises(UserError, match=r"train\.mode: expected joint with method diffae, found frozen"):
        load_config("tests/tiny.yaml", ["method=diffae", "train.mode=frozen", "denoiser.pretrained=x"])
    with pytest.raises(UserError, match="method: expected one of sami, beta_vae, diffae, found 'vae'"):
        load_config("tests/tiny.yaml", ["method=vae"])


def test_a_diffusion_autoencoder_has_nothing_without_latents():
    model, x_t, t = diffae(False).float(), normal(1, 1, 8, 8, dtype=torch.float32), torch.full((1,), 0.5)
    z = torch.zeros(1, 3)
    assert model.predict_eps(x_t, t, z).shape == x_t.shape
    for arguments in ({"z": None}, {"z": z, "scale": 2.0}):
        with pytest.raises(ValueError, match="expected latents and a guidance scale of 1"):
            model.predict_eps(x_t, t, **arguments)


def test_the_decoder_is_the_denoisers_way_up():
    config = load_config("disks", ["method=beta_vae"])
    model = build_model(config, (1, 16, 16))
    assert model.decode(torch.zeros(2, 8)).shape == (2, 1, 16, 16)
    sami = build_model(load_config("disks"), (1, 16, 16))
    encoder = sum(p.numel() for p in sami.encoder.parameters())
    assert encoder == sum(p.numel() for p in model.encoder.parameters())
    with pytest.raises(ValueError, match="the decoder's 3 halvings"):
        BetaVAE.build({"encoder": ENCODER, "decoder": PARTNER | {"image_size": 7, "channels": [4, 4, 4, 4]}}, SCHEDULE)


def test_unknown_method_in_a_saved_model(tmp_path):
    folder = train(load_config("tests/tiny.yaml", [f"runs_dir={tmp_path}"]))
    file = folder / "model/config.json"
    file.write_text(file.read_text().replace('"method": "sami"', '"method": "gan"'))
    with pytest.raises(UserError, match="expected a model of method sami, beta_vae, diffae, found 'gan'"):
        load_model(folder)
