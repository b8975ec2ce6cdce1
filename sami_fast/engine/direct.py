"""One process by itself: torch's fused Adam on weights that lie in one piece."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from . import partitions
from .base import BaseEngine, Losses, Measurement, torch_adam
from .capture import Captured

LINE = 64  # bytes; every weight begins where torch would let it begin if it were alone, which kernels ask for
ROWS = 64  # parts whose norms are taken one by one, so that the sum does not depend on how many threads share it


class Flat:
    """Weights of one network and dtype in one buffer, their gradients in another, and Adam's moments; the parameters become views.

    Args:
        named: The parameters by name. Each keeps its shape and, where it lies without gaps, its strides.
    """

    def __init__(self, named: dict[str, nn.Parameter]) -> None:
        first = next(iter(named.values()))
        step, self._places = LINE // first.element_size(), {}
        total = 0
        for name, parameter in named.items():
            self._places[name] = (total, parameter.shape, _strides(parameter))
            total += -(-parameter.numel() // step) * step
        unit = ROWS * step
        self.weights = first.detach().new_zeros(-(-total // unit) * unit)
        self.gradients = torch.zeros_like(self.weights)
        with torch.no_grad():
            for name, parameter in named.items():
                place = self.of(name, self.weights).copy_(parameter)
                parameter.data = place
                parameter.grad = self.of(name, self.gradients)

    def of(self, name: str, values: Tensor) -> Tensor:
        """The part of a buffer that belongs to a parameter, in its shape."""
        start, shape, strides = self._places[name]
        return values.as_strided(shape, strides, start)

    def norms(self) -> Tensor:
        """Norms of parts of the gradients. [ROWS] float32."""
        return self.gradients.view(ROWS, -1).norm(dim=1, dtype=torch.float32)


def _strides(parameter: nn.Parameter) -> tuple[int, ...]:
    """A parameter's own where it lies without gaps, such as channels-last; else those of a contiguous one."""
    return torch.empty_like(parameter, device="meta").stride()


class Engine(BaseEngine):
    """What `deepspeed.Engine` does where there is one process and nothing to split.

    Args:
        step: Holds both networks; called with the step's arguments and `denoiser`, what takes the place of its own denoiser or None, it
            returns (loss to differentiate, measurements [M]). `captured`, if it has one that is not None, takes its place.
        networks: Encoder and partner by name.
        config: The run's settings.
    """

    def __init__(self, step: nn.Module, networks: dict[str, nn.Module], config: Config) -> None:
        super().__init__(networks, config)
        self._step = step
        captured = getattr(step, "captured", None)
        self._captured = captured if isinstance(captured, Captured) else None
        alike: dict[tuple[str, torch.dtype], dict[str, nn.Parameter]] = defaultdict(dict)
        for name, parameter in self._trained.items():
            alike[name.partition(".")[0], parameter.dtype][name] = parameter
        flats = [Flat(named) for named in alike.values()]
        self._flats = flats
        self._flat_of = {name: flat for flat, named in zip(flats, alike.values(), strict=True) for name in named}
        self._weights, self._gradients = [flat.weights for flat in flats], [flat.gradients for flat in flats]
        self.optimizer = torch_adam(
            [{"params": [flat.weights], "name": network} for flat, (network, _) in zip(flats, alike, strict=True)], config.optimizer
        )
        for weights, gradients in zip(self._weights, self._gradients, strict=True):
            weights.grad = gradients
            moments = {moment: torch.zeros_like(weights) for moment in partitions.MOMENTS}
            self.optimizer.state[weights] = {"step": torch.zeros((), device=weights.device), **moments}
        self._averages: list[Tensor] = []
        if config.optimizer.ema_decay > 0:
            self._averages = [weights.clone() for weights in self._weights]
            of_flat = dict(zip(map(id, flats), self._averages, strict=True))
            self.averaged = {name: flat.of(name, of_flat[id(flat)]) for name, flat in self._flat_of.items()}

    def losses(self, x_0: Tensor, draw: Any, kl_weight: float, phase: str, denoiser: Callable[..., Tensor] | None = None) -> Losses:
        step = self._step if self._captured is None else self._captured
        return step(x_0, draw, kl_weight, phase, denoiser=denoiser)

    def update(self, step: int, losses: Callable[[int], Losses]) -> Measurement:
        torch._foreach_zero_(self._gradients)
        first, *more = [self._add_gradients(losses(micro)) for micro in range(self.config.engine.gradient_accumulation)]
        if self.config.optimizer.clip > 0:
            self._clip()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(group["name"], step)
        self.optimizer.step()
        if self._averages:
            self._average(step, self._averages, self._weights)
        return self._measured(sum(more, start=first))

    def _add_gradients(self, losses: Losses) -> Tensor:
        """Add those of one micro-batch, and return what was measured."""
        micro_batches = self.config.engine.gradient_accumulation
        if len(losses) == 2:
            loss, measured = losses
            loss = loss / micro_batches
            if self.config.engine.checkpoint_activations:  # whose recomputing knows no other way
                loss.backward()
                return measured
            parameters, share = list(self._trained.values()), 1.0
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        else:
            assert self._captured is not None
            parameters, share = self._captured.parameters, 1 / micro_batches
            _, measured, gradients = losses
        found = [(p.grad, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        torch._foreach_add_(*map(list, zip(*found, strict=True)), alpha=share)  # one kernel where backward would start one for each
        return measured

    def _clip(self) -> None:
        """Shrink gradients whose norm over all parameters is above `optimizer.clip`, as DeepSpeed does."""
        norm = torch.cat([flat.norms() for flat in self._flats]).norm()
        shrink = (self.config.optimizer.clip / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(self._gradients, shrink)

    def _moment(self, name: str, moment: str) -> Tensor:
        flat = self._flat_of[name]
        return flat.of(name, self.optimizer.state[flat.weights][moment])

    def _restore(self, name: str, weight: Tensor, moments: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self._trained[name].copy_(weight)
            for moment, value in moments.items():
                self._moment(name, moment).copy_(value)

    def _steps_taken(self) -> int:
        return partitions.steps_taken(self)

    def _set_steps_taken(self, count: int) -> None:
        partitions.set_steps_taken(self, count)
