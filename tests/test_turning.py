"""Latent axes turned in mid-training: the turn itself, what is read for it, and that heads, averages and moments turn together."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import rows, tiny
from safetensors.torch import load_file
from scipy.stats import ortho_group

from sami_fast import turning
from sami_fast.engine.checkpoints import WEIGHTS, list_checkpoints
from sami_fast.errors import UserError
from sami_fast.methods.build import build_model
from sami_fast.methods.latent_model import Posterior
from sami_fast.methods.sami import Sami
from sami_fast.train import Trainer, train
from sami_fast.turning import COUPLED, read, rotation, turn_of


def mixed(energies, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean J J^T of latents that are a rotation of others, which move the pixels by `energies`; and that rotation."""
    turn = ortho_group.rvs(len(energies), random_state=seed) if len(energies) > 1 else np.eye(1)
    return turn @ np.diag(energies) @ turn.T, turn


def correlations(coupling: np.ndarray) -> np.ndarray:
    size = np.sqrt(np.diag(coupling))
    return np.abs(coupling / np.outer(size, size) - np.eye(len(coupling)))


# The rotation


@pytest.mark.parametrize("seed", range(5))
def test_a_mixture_is_taken_apart(seed):
    coupling, turn = mixed([1.0, 3.0, 8.0, 20.0], seed)
    found = rotation(np.eye(4), coupling, 1e-9)
    np.testing.assert_allclose(found @ found.T, np.eye(4), atol=1e-12)
    np.testing.assert_allclose(np.abs(found @ turn).max(1), 1.0, atol=1e-6)  # each axis one of those that were mixed


@pytest.mark.parametrize("degrees", [3, 20, 44])
def test_an_axis_keeps_its_place_and_its_sign(degrees):
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    found = rotation(np.eye(2), turn @ np.diag([1.0, 5.0]) @ turn.T)
    np.testing.assert_allclose(found @ turn, np.eye(2), atol=1e-9)


def test_the_turn_is_that_of_latents_of_one_spread():
    """A latent of half the spread has half the gradient for the same share of it."""
    coupling, _ = mixed([1.0, 6.0, 2.5], 3)
    spread = np.diag([1.0, 0.5, 0.8])
    found = rotation(spread @ spread, spread @ coupling @ spread, 1e-9)
    np.testing.assert_allclose(found, rotation(np.eye(3), coupling, 1e-9), atol=1e-9)


def test_what_may_be_chance_is_left_as_it_is():
    coupling = np.array([[1.0, 0.9 * COUPLED], [0.9 * COUPLED, 1.0]])
    np.testing.assert_array_equal(rotation(np.eye(2), coupling), np.eye(2))
    assert not np.array_equal(rotation(np.eye(2), coupling, 0.5 * COUPLED), np.eye(2))


def test_latents_alike_stay_and_no_pair_is_left_coupled():
    coupling, _ = mixed([1.0, 1.0, 1.02, 4.0, 4.1, 30.0], 7)
    found = rotation(np.eye(6), coupling)
    assert correlations(found @ coupling @ found.T).max() <= COUPLED
    np.testing.assert_array_equal(rotation(np.eye(3), 2.5 * np.eye(3)), np.eye(3))


def test_only_live_latents_are_turned():
    generator = np.random.default_rng(0)
    mu = generator.normal(size=(2000, 4)) * [1.0, 1e-3, 1.0, 1e-3]
    coupling, _ = mixed([1.0, 7.0, 3.0, 12.0], 1)
    turn = turn_of(mu, np.full_like(mu, 0.01), coupling)
    np.testing.assert_array_equal(turn[[1, 3]], np.eye(4)[[1, 3]])
    np.testing.assert_array_equal(turn[:, [1, 3]], np.eye(4)[:, [1, 3]])
    assert abs(turn[0, 2]) > 0.05
    np.testing.assert_allclose(turn @ turn.T, np.eye(4), atol=1e-12)
    copied = np.column_stack((mu[:, 0], mu[:, 1], -mu[:, 0], mu[:, 3]))
    for few in (mu * [1.0, 1.0, 0.0, 1.0], mu * 0.0, mu[:2], copied):  # one live latent, none, two images, two latents that say the same
        np.testing.assert_array_equal(turn_of(few, np.full_like(few, 0.01), coupling), np.eye(4))


# What is read


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_coupling_is_that_of_the_gradients(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 48, generator=generator).to(dtype)
    x_0 = (torch.rand(300, 3, 4, 4, generator=generator) * 2 - 1).to(dtype)

    def encode(x):
        h = x.flatten(1) @ weight.T
        return Posterior(torch.stack((h[:, 0], h[:, 1].sin(), h[:, 2] * h[:, 0]), 1), torch.full_like(h, 0.1))

    def images(places):
        return x_0[places]

    mu, var, coupling = read(encode, images, torch.arange(300), 64, 0)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: encode(x[None]).mu[0]))(x_0).flatten(2).double()
    expected = (jacobian @ jacobian.mT).mean(0).numpy()
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert np.abs((coupling - expected) / scale).max() < 0.06  # 2400 random directions
    np.testing.assert_allclose(mu, encode(x_0).mu.double().numpy(), rtol=1e-6)
    np.testing.assert_allclose(var, 0.1, rtol=1e-6)
    np.testing.assert_array_equal(read(encode, images, torch.arange(300), 64, 0)[2], coupling)
    assert not np.array_equal(read(encode, images, torch.arange(300), 64, 1)[2], coupling)


# In training


TURN = np.array([[0.8, 0.6, 0.0, 0.0], [-0.6, 0.8, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])


def kept(run) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(run / "checkpoints")[0] / WEIGHTS)


@pytest.mark.parametrize(
    "options",
    [
        ["engine.kind=direct"],
        *(["engine.kind=deepspeed", f"engine.zero_stage={stage}"] for stage in range(4)),
        ["engine.zero_stage=2", "engine.offload=optimizer"],
        ["optimizer.ema_decay=0"],
    ],
    ids=" ".join,
)
def test_heads_turn_with_their_averages_and_moments(options, tmp_path, monkeypatch):
    monkeypatch.setattr(turning, "turn_of", lambda *_: TURN)
    trainer = Trainer(tiny(tmp_path, *options), resume=False, overwrite=False)
    for _ in range(6):
        trainer.update()[1].read()
        trainer.step += 1
    before = {name: value.clone() for name, value in trainer.engine._training_state()}
    images = trainer.dataset.training_images(torch.arange(5))
    codes = trainer.model.encode(images)
    trainer._turn_axes()
    after = dict(trainer.engine._training_state())
    turn = torch.from_numpy(TURN).float()
    heads = 0
    for name, value in before.items():
        head = name.removeprefix("encoder.").partition(".")[0]
        if name.startswith("encoder.") and head in ("mu", "raw_var"):
            heads += 1
            mixing = turn.square() if head == "raw_var" else turn
            mixing = mixing.square() if name.endswith("exp_avg_sq") else mixing
            torch.testing.assert_close(after[name], torch.tensordot(mixing, value, 1), rtol=1e-5, atol=1e-7)
            assert not torch.equal(after[name], value) or not value.any(), name
        else:
            assert torch.equal(after[name], value), name
    assert heads == 4 * (3 if "optimizer.ema_decay=0" in options else 4)
    turned = trainer.model.encode(images)
    torch.testing.assert_close(turned.mu, codes.mu @ turn.T, rtol=1e-4, atol=1e-6)
    assert not torch.equal(turned.var, codes.var)
    trainer.update()[1].read()  # and training goes on with them: what it keeps for itself has been turned too
    moved = {name: value for name, value in trainer.engine._training_state() if name == "encoder.mu.weight/weight"}
    assert (moved["encoder.mu.weight/weight"] - after["encoder.mu.weight/weight"]).abs().max() < 0.01
    trainer.feed.close()
    trainer.run_folder.release()


def test_a_run_turns_when_asked_and_goes_on_to_the_bit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(turning, "turn_of", lambda *_: TURN)
    whole = train(tiny(tmp_path, "name=whole", "train.turn=[0.25,0.5]"))  # 4 steps of the denoiser alone, then 8
    said = capsys.readouterr().out
    assert "step 6: 2 latent axes turned, by 37 degrees at most" in said
    assert "step 8: 2 latent axes turned, by 37 degrees at most" in said
    assert said.count("turned") == 2
    never = train(tiny(tmp_path, "name=never"))
    losses = [[row["loss_nats"] for row in rows(run) if "loss_nats" in row] for run in (whole, never)]
    assert losses[0][:6] == losses[1][:6]
    assert losses[0][6:] != losses[1][6:]
    stopped = Trainer(config := tiny(tmp_path, "name=stopped", "train.turn=[0.25,0.5]"), resume=False, overwrite=False)
    save = stopped.engine.save

    def interrupted(folder, step, *rest):
        save(folder, step, *rest)
        if step == 8:  # the second turn is of the step after this checkpoint
            raise InterruptedError

    stopped.engine.save = interrupted
    with pytest.raises(InterruptedError):
        stopped.run()
    resumed = train(config, resume=True)
    for name, value in kept(whole).items():
        assert torch.equal(kept(resumed)[name], value), name


def test_methods_that_read_latents_never_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(turning, "turn_of", lambda *_: pytest.fail("turned"))
    config = tiny(tmp_path, "method=beta_vae")
    train(replace(config, train=replace(config.train, turn=[0.5])))  # as where a config file asks for it
    with pytest.raises(UserError, match=r"train\.turn: .*method sami"):
        tiny(tmp_path, "method=beta_vae", "train.turn=[0.5]")
    with pytest.raises(UserError, match=r"train\.turn: expected numbers above 0 and below 1"):
        tiny(tmp_path, "train.turn=[1.0]")


def test_an_encoder_of_ones_own_stays_as_it_is(tmp_path, monkeypatch, capsys):
    """Its last layers are not known, though they may have the same names."""

    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mu, self.raw_var = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4), torch.nn.Tanh()) for _ in range(2))

        def forward(self, x):
            return self.mu(x), self.raw_var(x).exp()

    monkeypatch.setattr(turning, "turn_of", lambda *_: pytest.fail("turned"))
    config = tiny(tmp_path)
    ours = build_model(config, (1, 8, 8))
    train(
        replace(config, train=replace(config.train, turn=[0.5])),
        Sami(Own(), ours.denoiser, ours.schedule, image_shape=(1, 8, 8), latent_size=4),
    )
    assert "turned" not in capsys.readouterr().out
