"""Networks with other conventions than ours: what they are given and what they return, turned into `x -> (mu, var)` and `(x_t, t) -> eps`.

They stay in evaluation mode while they learn, too: dropout is off and batch norms use their running statistics, since q(z|x) and its
score are those of one image and may depend neither on chance nor on the images beside it.
"""

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from .accelerate import accelerate
from .errors import UserError, one_line
from .named import load_named
from .schedule import Schedule, alpha_sigma

RETURNS = ("mu_var", "mu_logvar", "mu_std")
TAKES = ("x", "x_t")
TIMES = ("unit", "timestep", "sigma", "logsnr", "edm")
PREDICTS = ("eps", "v", "x_0")
BETAS = ("linear", "scaled_linear", "cosine")


class Adapter(nn.Module):
    """A network inside, which stays in evaluation mode."""

    image_shape: tuple[int, ...]

    def train(self, mode: bool = True) -> Self:
        return super().train(False)


class EncoderAdapter(Adapter):
    """An encoder of any convention as x -> (mu, var).

    Args:
        network: x [B, C, H, W], and t [B] where `takes` is "x_t", to: mu and a spread, [B, Z] each; or one tensor [B, 2 Z] of both; or a
            torch Normal, alone or in Independent.
        returns: What the spread is: "mu_var" the variance, "mu_logvar" its natural logarithm, "mu_std" its root.
        takes: "x": blind to the noise. "x_t": told the noise level t in [0, 1], 0 of clean images.
    Shapes:
        x [B, C, H, W], t [B] or None for clean images -> mu, var, [B, Z] each, float32 at least.
    Raises:
        ValueError: unknown convention, or outputs that are of none.
    Differentiable: as the network, which has to be twice.
    """

    latent_size: int

    def __init__(self, network: Callable[..., Any], returns: str = "mu_var", takes: str = "x") -> None:
        super().__init__()
        for name, value, known in (("returns", returns, RETURNS), ("takes", takes, TAKES)):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, found {value!r}")
        self.network, self.returns, self.told_level = network, returns, takes == "x_t"
        self.eval()

    def outputs(self, x: Tensor, t: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """mu and the spread that the network returns, [B, Z] each; of a distribution, the spread that `returns` says."""
        level = () if not self.told_level else (x.new_zeros(x.shape[0]) if t is None else t.to(x.dtype),)
        found = self.network(x, *level)
        if isinstance(found.base_dist if isinstance(found, Independent) else found, Normal):
            std = _full(found.stddev)
            mu, spread = _full(found.mean), {"mu_var": torch.square, "mu_logvar": lambda s: 2 * s.log(), "mu_std": _full}[self.returns](std)
        else:
            mu, spread = map(_full, _pair(found))
        if mu.dim() != 2 or mu.shape[0] != x.shape[0] or mu.shape != spread.shape:
            raise ValueError(f"expected mu and its spread as [{len(x)}, Z] each, found {list(mu.shape)} and {list(spread.shape)}")
        return mu, spread

    def forward(self, x: Tensor, t: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mu, spread = self.outputs(x, t)
        return mu, {"mu_var": _full, "mu_logvar": torch.exp, "mu_std": torch.square}[self.returns](spread)


def _pair(found: Any) -> tuple[Tensor, Tensor]:
    if isinstance(found, Tensor):
        if found.dim() != 2 or found.shape[1] % 2:
            raise ValueError(f"expected mu and its spread, or one tensor [B, 2 Z] of both, found one of {list(found.shape)}")
        first, second = found.chunk(2, 1)
        return first, second
    if isinstance(found, tuple | list) and len(found) == 2 and all(isinstance(part, Tensor) for part in found):
        return found[0], found[1]
    many = f"{len(found)} things" if isinstance(found, tuple | list) else f"a {type(found).__name__}"
    raise ValueError(f"expected mu and its spread, one tensor of both, or a torch Normal, found {many}")


def _full(part: Tensor) -> Tensor:
    """In float32 at least, as the heads of our own encoder are under autocast."""
    return part.to(torch.promote_types(part.dtype, torch.float32))


class DenoiserAdapter(Adapter):
    """A denoiser of any convention as (x_t, t) -> eps_pred.

        eps = prediction                                "eps"
        eps = sigma_t x_t + alpha_t prediction          "v", alpha_t eps - sigma_t x_0
        eps = (x_t - alpha_t prediction) / sigma_t      "x_0"

    Args:
        network: (image [B, C, H, W], time [B]) -> prediction [B, C, H, W], or an object whose `sample` or `pred` that is, or a tuple that
            begins with it. Channels after the C-th, a learned variance, are dropped.
        schedule: What t means.
        time: What the network is told: "unit" t in [0, 1], "sigma" sigma_t, "logsnr" ln(alpha_t^2 / sigma_t^2). "edm": sigma_t / alpha_t,
            and the image is x_t / alpha_t. Whole timesteps: `pretrained.DiscreteTimeDenoiser`.
        predicts: What the prediction is.
    Shapes:
        x_t [B, C, H, W], t [B] -> [B, C, H, W], of the dtype of x_t, as is what the network is told (timesteps keep theirs).
    Raises:
        ValueError: unknown convention, or an output of another shape.
    Differentiable: as the network.
    """

    def __init__(self, network: Callable[..., Any], schedule: Schedule, *, time: str = "unit", predicts: str = "eps") -> None:
        super().__init__()
        for name, value, known in (("time", time, TIMES), ("predicts", predicts, PREDICTS)):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, found {value!r}")
        self.network, self.schedule, self.time, self.predicts = network, schedule, time, predicts
        self.eval()

    def told(self, t: Tensor) -> Tensor:
        """What the network is told of the level of t. [B] -> [B]."""
        if self.time == "unit":
            return t
        logsnr = self.schedule.logsnr(t)
        return {"sigma": lambda: alpha_sigma(logsnr)[1], "logsnr": lambda: logsnr, "edm": lambda: torch.exp(-0.5 * logsnr)}[self.time]()

    def _amplitudes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, [B, 1, 1, 1] each."""
        alpha_t, sigma_t = alpha_sigma(self.schedule.logsnr(t))
        return alpha_t.view(-1, 1, 1, 1), sigma_t.view(-1, 1, 1, 1)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        image, told = (x_t / self._amplitudes(t)[0]).to(x_t.dtype) if self.time == "edm" else x_t, self.told(t)
        found = self.network(image, told if self.time == "timestep" else told.to(x_t.dtype))
        channels, kinds = x_t.shape[1], (Tensor, tuple, list)
        if not isinstance(found, kinds):  # a Tensor has no `sample`, but a Distribution has one that is a method
            found = next((part for name in ("sample", "pred") if isinstance(part := getattr(found, name, None), Tensor)), found)
        found = found[0] if isinstance(found, tuple | list) and found else found
        if not isinstance(found, Tensor) or found.dim() != 4 or found[:, :channels].shape != x_t.shape or found.shape[1] % channels:
            shape = list(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise ValueError(f"expected a prediction of {list(x_t.shape)}, found {shape}")
        predicted = found[:, :channels].to(x_t.dtype)
        if self.predicts == "eps":
            return predicted
        alpha_t, sigma_t = self._amplitudes(t)
        eps_pred = sigma_t * x_t + alpha_t * predicted if self.predicts == "v" else (x_t - alpha_t * predicted) / sigma_t
        return eps_pred.to(x_t.dtype)


def alphas_cumprod(betas: str, timesteps: int) -> Tensor:
    """alpha_t^2 of timesteps 0, 1, ..., of DDPM's betas, scaled for other numbers than its 1000. [timesteps] float64.

    linear         beta from 1e-4 to 0.02 (Ho et al., arXiv:2006.11239)
    scaled_linear  the root of beta linear, from 0.00085 to 0.012 (Rombach et al., arXiv:2112.10752)
    cosine         alpha_t^2 = cos^2, beta at most 0.999 (Nichol & Dhariwal, arXiv:2102.09672)
    """
    scale = 1000 / timesteps
    if betas == "cosine":
        raw = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
        alphas = torch.cos((raw + 0.008) / 1.008 * torch.pi / 2).square()
        beta = 1 - alphas[1:] / alphas[:-1]
    elif betas == "linear":
        beta = scale * torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)
    else:
        beta = scale * torch.linspace(0.00085**0.5, 0.012**0.5, timesteps, dtype=torch.float64).square()
    return (1 - beta.clamp_max(0.999)).cumprod(0)


# ---- networks by name


def named_classes(architecture: dict[str, Any]) -> dict[str, str]:
    """The classes that a model's architecture asks to import, {network: package.module:Name}."""
    return {key: str(part["class"]) for key, part in architecture.items() if isinstance(part, dict) and "class" in part}


def construct(key: str, arguments: dict[str, Any]) -> nn.Module:
    """What the class `arguments["class"]` makes of `kwargs`, and of the image shape and the latent size where it has such parameters.

    Args:
        key: "encoder" or "denoiser", for messages.
        arguments: The network's part of an architecture.
    Raises:
        UserError: it cannot be imported or made, or is no module.
    """
    spec = arguments["class"]
    made_by = load_named(spec, f"{key}.class")
    given = copy.deepcopy(_known(made_by, arguments) | arguments["kwargs"])
    try:
        network = made_by(**given)
    except Exception as error:  # of a stranger's class: any
        raise UserError(f"{key}.kwargs: {spec} cannot be made with {given} ({_words(error)})") from None
    if not isinstance(network, nn.Module):
        raise UserError(f"{key}.class: expected a torch.nn.Module from {spec}, found a {type(network).__name__}")
    network.float()
    if arguments["accelerate"]:
        accelerate(network)
    return network


def _known(made_by: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """What a class is told beside its `kwargs`: the image shape and the latent size, if it has parameters of these names."""
    try:
        parameters = inspect.signature(made_by).parameters
    except (TypeError, ValueError):  # none that Python can tell
        return {}
    return {name: arguments[name] for name in ("image_shape", "latent_size") if name in parameters and name in arguments}


def named_encoder(arguments: dict[str, Any]) -> EncoderAdapter:
    """The encoder of this part of an architecture; how many latents it has is seen in what it makes of two blank images.

    Raises:
        UserError: as `construct`, and where it does not take such images or returns something else than it says.
    """
    encoder = EncoderAdapter(construct("encoder", arguments), arguments["returns"], arguments["takes"])
    encoder.image_shape = tuple(arguments["image_shape"])
    with torch.no_grad(), explained("encoder", arguments["class"], encoder):
        mu, _ = encoder(torch.zeros(2, *encoder.image_shape))
    encoder.latent_size = mu.shape[1]
    told = (_known(load_named(arguments["class"], "encoder.class"), arguments) | arguments["kwargs"]).get(
        "latent_size", encoder.latent_size
    )
    if told != encoder.latent_size:
        raise UserError(f"encoder.class: {arguments['class']} was told latent_size={told} and returns {encoder.latent_size} latents")
    return encoder


@contextmanager
def explained(key: str, spec: str, adapter: Adapter) -> Iterator[None]:
    """Inside a named network is called: its errors become a sentence that names the setting which may be wrong."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of a stranger's network: any
        words = _words(error)
        fitting = ((setting, hint) for setting, applies, pattern, hint in HINTS if applies(adapter) and re.search(pattern, words))
        setting, hint = next(fitting, ("class", ""))
        raise UserError(f"{key}.{setting}: {spec}: {words}{hint}") from None


def _words(error: Exception) -> str:
    words = one_line(error)
    return words if type(error) is ValueError else f"{type(error).__name__}: {words}"


# What an error in a network says about a setting: which, of what adapters, errors like this, and what to do.
HINTS: tuple[tuple[str, Callable[[Any], bool], str, str], ...] = (
    (
        "takes",
        lambda a: isinstance(a, EncoderAdapter) and not a.told_level,
        r"TypeError.* missing 1 required positional argument",
        "; if that is the noise level, set encoder.takes=x_t",
    ),
    (
        "takes",
        lambda a: isinstance(a, EncoderAdapter) and a.told_level,
        r"TypeError.* takes .*positional arguments? but",
        "; if it is not told the noise level, set encoder.takes=x",
    ),
    (
        "time",
        lambda a: isinstance(a, DenoiserAdapter) and a.time != "timestep",
        r"Long|Int\b|IntTensor|indices must be|used as indices|int64",
        "; if it wants whole timesteps, set denoiser.time=timestep",
    ),
    (
        "timesteps",
        lambda a: isinstance(a, DenoiserAdapter) and a.time == "timestep",
        r"IndexError|out of range|out of bounds",
        "; if it knows fewer timesteps, set denoiser.timesteps",
    ),
    (
        "time",
        lambda a: isinstance(a, DenoiserAdapter) and a.time == "timestep",
        r"Long|Int\b|int64",
        "; if it wants no whole timesteps, set denoiser.time to unit, sigma, logsnr or edm",
    ),
)
