"""What somebody else's networks do with one batch, looked at before a run begins: a wrong convention is one sentence, not a bad run."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from . import ops, score
from .adapters import DenoiserAdapter, EncoderAdapter, explained, named_classes
from .errors import UserError, one_line
from .methods.latent_model import LatentModel
from .step import Draw, Objective, noised

ALONE = 1e-2  # of its own size, by which the result for an image may differ where others are beside it: other sums, no other images
FIX = "; set encoder.accelerate=true, which puts operations that have one in place of attention and norms"


def check_first_batch(model: LatentModel, x_0: Tensor, seed: int) -> list[str]:
    """Look at a model's networks that are classes by name. Parameters that the loss does not reach are frozen.

    Args:
        model: On the device of the images.
        x_0: Images of the data in [-1, 1]. [B, C, H, W], B of 2 or more.
        seed: Key of the noise.
    Returns:
        What there is to say of them: what stays as it is.
    Raises:
        UserError: one of them does not do what the settings say.
    """
    classes = named_classes(model.architecture or {})
    if not classes:
        return []
    index = torch.arange(len(x_0), device=x_0.device)
    draw = Draw(seed, ops.EVALUATION_STEP, index, len(x_0))
    x_t, _, t, _, _ = noised(model.schedule, x_0, draw, Objective(), True)
    said = []
    if "encoder" in classes and isinstance(model.encoder, EncoderAdapter):
        said += _check_encoder(model.encoder, classes["encoder"], x_0, x_t, t)
    denoiser = model.networks.get("denoiser")
    if "denoiser" in classes and isinstance(denoiser, DenoiserAdapter):
        said += _check_denoiser(denoiser, classes["denoiser"], x_t, t)
    return said


def _check_encoder(encoder: EncoderAdapter, spec: str, x_0: Tensor, x_t: Tensor, t: Tensor) -> list[str]:
    with explained("encoder", spec, encoder), torch.no_grad():
        mu, var = encoder(x_0)
        noisy_mu, noisy_var = encoder(x_t, t)
        alone, _ = encoder(x_t[:1], t[:1])
        # Far outside of the data a head that may become negative does, which takes a while on images
        spread = torch.cat([encoder.outputs(factor * x, t)[1] for factor in (1, 10, -10) for x in (x_0, x_t)])
    if encoder.returns != "mu_logvar" and (spread < 0).any():
        what = "variances" if encoder.returns == "mu_var" else "standard deviations"
        raise UserError(f"encoder.returns: {spec} returns {what} below 0; if they are log variances, set encoder.returns=mu_logvar")
    for what, means, variances in (("images", mu, var), ("noisy images", noisy_mu, noisy_var)):
        if not (means.isfinite().all() and variances.isfinite().all()):
            name = "mu" if not means.isfinite().all() else "var"
            hint = "; if it returns a variance, set encoder.returns=mu_var" if name == "var" and encoder.returns == "mu_logvar" else ""
            raise UserError(f"encoder.returns: {name} of {what} by {spec} is not finite{hint}")
        if not (variances > 0).all():
            raise UserError(f"encoder.returns: expected var above 0, {spec} returns 0 for {what}")
    _require_alone("encoder", spec, alone, noisy_mu)
    z = (mu + var.sqrt()).detach()
    with explained("encoder", spec, encoder):
        try:
            mu, var = encoder(x_t, t)
            g = score.grad_log_q(score.at_level(encoder, t), x_t, z, "reverse")
            reached = _reached((g.square().sum(), mu.sum(), var.sum()), encoder)
        except score.NoSecondDerivativeError:
            raise UserError(f"encoder.accelerate: {spec} has no second derivative{FIX}") from None
        except RuntimeError as error:  # torch has no class of its own for any of these
            words = one_line(error)
            if "does not require grad" in words or "not have been used in the graph" in words:
                raise UserError(f"encoder.class: the latents of {spec} have no gradient in the image, which SAMI is trained by") from None
            raise
    if not g.isfinite().all():
        raise UserError(f"encoder.class: the gradient of log q(z|x) in the image, by {spec}, is not finite")
    if not g.any():
        raise UserError(f"encoder.class: the latents of {spec} do not depend on the image")
    return _frozen("encoder", encoder, reached)


def _check_denoiser(denoiser: DenoiserAdapter, spec: str, x_t: Tensor, t: Tensor) -> list[str]:
    with explained("denoiser", spec, denoiser):
        eps_pred = denoiser(x_t, t)
        with torch.no_grad():
            alone = denoiser(x_t[:1], t[:1])
    if not eps_pred.isfinite().all():
        raise UserError(f"denoiser.class: the prediction of {spec} is not finite")
    if any(p.requires_grad for p in denoiser.parameters()) and not eps_pred.requires_grad:
        raise UserError(f"denoiser.class: the prediction of {spec} has no gradient in its parameters")
    _require_alone("denoiser", spec, alone, eps_pred.detach())
    if not eps_pred.requires_grad:  # a frozen one
        return []
    return _frozen("denoiser", denoiser, _reached((eps_pred.sum(),), denoiser))


def _require_alone(key: str, spec: str, alone: Tensor, together: Tensor) -> None:
    """What a network makes of an image depends on it alone: not on the images beside it, nor on chance."""
    if (alone - together[:1]).abs().max() > ALONE * together.abs().max().clamp_min(1e-6):
        raise UserError(
            f"{key}.class: {spec} gives an image another result beside other images than alone, or another each time; expected one that "
            "depends on the image alone, without norms over the batch and without chance"
        )


def _reached(outputs: Iterable[Tensor], network: nn.Module) -> dict[str, bool]:
    """Which trained parameters a gradient reaches, by name."""
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(list(outputs), list(named.values()), allow_unused=True) if named else ()
    return {name: gradient is not None for name, gradient in zip(named, found, strict=True)}


def _frozen(key: str, network: nn.Module, reached: dict[str, bool]) -> list[str]:
    """Freeze what is not reached, for which optimisers keep nothing; what to say of it."""
    if not any(reached.values()):
        raise UserError(f"{key}.class: expected parameters that learn, found none")
    refuse_tied(f"{key}.class", network)
    stays = [name for name, there in reached.items() if not there]
    for name in stays:
        network.get_parameter(name).requires_grad_(False)
    names = ", ".join(name.removeprefix("network.") for name in stays[:4]) + (f" and {len(stays) - 4} more" if len(stays) > 4 else "")
    return [f"{key}: no gradient reaches {names}, which stay as they are"] if stays else []


def refuse_tied(what: str, network: nn.Module) -> None:
    """A `UserError` that begins with `what`, where a weight has two names: of the two, only one would be trained and saved."""
    first: dict[int, str] = {}
    for name, value in network.named_parameters(remove_duplicate=False):
        if (other := first.setdefault(id(value), name)) != name:
            raise UserError(f"{what}: expected each weight under one name, found {other} again as {name}")
