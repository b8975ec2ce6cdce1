"""Steps of configs on fake CUDA tensors, in a process of its own: what there is against each of them, as JSON.

    python tests/fake_gpu/worker.py DEVICE JOBS

DEVICE is device.cpp, compiled; JOBS a list of {"config", "settings", "fault"}, the last one of FAULTS or "". Prints a list of
[config, fault, phase, "plain" or "captured", {"operators", "convolutions", "launches"}, {what was found: how often}].
"""

import ctypes
import json
import sys

ctypes.CDLL(sys.argv[1])  # torch asks once, when it is imported, what devices there are

from collections import Counter  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import contextmanager, nullcontext  # noqa: E402
from typing import Any  # noqa: E402
from unittest.mock import patch  # noqa: E402

import torch  # noqa: E402
from sami_fast.kernels._common import recording  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from sami_fast import plan, step  # noqa: E402
from sami_fast.config import Config, load_config  # noqa: E402
from sami_fast.engine import base, direct  # noqa: E402
from sami_fast.engine.bank import Bank  # noqa: E402
from sami_fast.engine.capture import Captured  # noqa: E402
from sami_fast.gpu_step import EachOperator  # noqa: E402
from sami_fast.models.layers import lay_out_weights  # noqa: E402
from sami_fast.step import Draw  # noqa: E402
from sami_fast.train import TrainingModule  # noqa: E402

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
IMAGES = {"convolution": 2, "convolution_backward": 3}  # arguments that have channels: x and weight, and the gradient of y before them
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2")  # what the host cannot go on without, of which fakes say it too

# Without a driver torch switches autocast off.
torch.cuda.amp.common.amp_definitely_not_available = lambda: False
torch.cuda.is_bf16_supported = lambda *_, **__: True
# The engine's measurements go to pinned memory, and are read when the next step is under way.
base.Measurement = lambda values: values


class Watch(EachOperator):
    """Counts what runs inside, and what should not: tensors of the CPU, waiting for the GPU, convolutions of images that do not lie
    channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.convolutions = 0
        self.found: Counter[str] = Counter()

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func.overloadpacket.__name__
        self.operators += 1
        if name in WAITS:
            self.found[f"{name} waits"] += 1
        out = func(*args, **kwargs)
        # kernels/ asks the device "meta", which has no data either, how a result will lie.
        if any(isinstance(x, Tensor) and x.is_cpu for x in tree_leaves((args, kwargs, out))):
            self.found[f"{name} on the CPU"] += 1
        if name in IMAGES:
            self.convolutions += 1
            for x in args[: IMAGES[name]]:
                if not _channels_innermost(x):
                    self.found[f"{name} with channels outermost"] += 1
        return out


def _channels_innermost(x: Tensor) -> bool:
    """Or of no consequence: one channel, or one number for all."""
    return x.stride(1) == 1 or x.is_contiguous(memory_format=torch.channels_last) or not any(x.stride())


# ---- faults


def _in_loss(change: Callable[[Tensor], Tensor]) -> Any:
    """Plants a fault where every step comes by."""
    real = step.per_image
    return patch.object(step, "per_image", lambda per_sample, levels: change(real(per_sample, levels)))


def _same(x: Tensor) -> Tensor:
    return x


@contextmanager
def _weights_as_in_files() -> Iterator[None]:
    with patch(f"{__name__}.lay_out_weights", lambda model: None):
        yield


@contextmanager
def _images_as_in_files() -> Iterator[None]:
    with patch("sami_fast.models.encoder.for_convolutions", _same), patch("sami_fast.models.denoiser.for_convolutions", _same):
        yield


FAULTS: dict[str, Callable[[], Any]] = {
    "": nullcontext,
    "made on the CPU": lambda: _in_loss(lambda x: x * torch.ones(len(x))),
    "a number on the CPU": lambda: _in_loss(lambda x: x * torch.ones(())),
    "sent to the GPU": lambda: _in_loss(lambda x: x * torch.ones(len(x)).to(x.device)),
    "sent to the CPU": lambda: _in_loss(lambda x: x.cpu().to(x.device)),
    "read": lambda: _in_loss(lambda x: x * x.sum().item()),
    "asked": lambda: _in_loss(lambda x: x * 2 if x.sum() > 0 else x),
    "chosen": lambda: _in_loss(lambda x: x + x[x > 0].sum()),
    "weights as in files": _weights_as_in_files,
    "images as in files": _images_as_in_files,
}


# ---- steps


def _move(model: nn.Module) -> None:
    """To the device, as far as that holds data."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(weight, device=CUDA), weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=CUDA)
    lay_out_weights(model)


def _watched(work: Callable[[], Any]) -> tuple[dict[str, int], dict[str, int]]:
    watch = Watch()
    with recording(lambda launch: None) as launches, torch.autograd.set_multithreading_enabled(False):
        try:
            with watch:
                work()
        except Exception as error:  # fake tensors refuse what cannot be done
            watch.found[f"{type(error).__name__}: {error}".splitlines()[0]] += 1
    return {"operators": watch.operators, "convolutions": watch.convolutions, "launches": len(launches)}, dict(watch.found)


def steps(config: Config, planted: Callable[[], Any]) -> Iterator[tuple[Any, ...]]:
    """One step of each phase of a config, by the engine, update and all, and as it is captured."""
    image_shape = plan.image_shape_of(config)
    model: Any = plan.networks_of(config, image_shape)
    with FakeTensorMode(allow_non_fake_inputs=True), planted():
        _move(model)
        module = TrainingModule(model, config)
        engine = direct.Engine(module, model.networks, config)
        images = config.train.batch_size // config.engine.gradient_accumulation
        x_0, index = torch.empty(images, *image_shape, device=CUDA), torch.empty(images, dtype=torch.int64, device=CUDA)
        beta = torch.empty((), device=CUDA)
        phases = {config.phase(number): number for number in (config.train.steps - 1, config.first_joint_step, 0)}
        if config.mode == "staged":
            phases["denoiser"] = 0  # in a run of its own, before this one
        for phase, number in phases.items():
            draw = Draw(config.seed, config.shown(number), index, config.train.batch_size, number)
            bank = Bank(model.denoiser) if config.train.bank_steps and phase == "encoder" else None
            losses = (draw, 0.5, phase) if bank is None else (draw, 0.5, phase, bank)
            yield phase, "plain", *_watched(lambda: engine.update(number, lambda _: engine.losses(x_0, *losses)))  # noqa: B023
            known = None if bank is None else bank.known()
            tensors = (x_0, index, beta) if known is None else (x_0, index, beta, known)
            yield phase, "captured", *_watched(_Line(module, tensors, draw, phase))


class _Line:
    """The captured step; that it is written down is not a part of it."""

    def __init__(self, module: TrainingModule, tensors: tuple[Tensor, ...], draw: Draw, phase: str) -> None:
        self._error, self._tensors = None, tensors
        with recording(lambda launch: None):
            try:
                self._line = Captured(module)._traced(tensors, draw, phase)
            except Exception as error:
                self._error = error

    def __call__(self) -> None:
        if self._error is not None:
            raise self._error
        self._line(self._tensors, (1, 1))


def main() -> None:
    found = []
    for job in json.loads(sys.argv[2]):
        # DeepSpeed, which these ask for on several GPUs, does not run without one.
        config = load_config(job["config"], ["engine.zero_stage=0", "log.tensorboard=false", *job["settings"]])
        found += [(job["config"], job["fault"], *rest) for rest in steps(config, FAULTS[job["fault"]])]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
