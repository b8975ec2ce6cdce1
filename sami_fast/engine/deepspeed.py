"""DeepSpeed: several ranks, ZeRO, offload. One engine around both networks or one around each, and its optimisers."""

import math
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config, bucket_elements, deepspeed_dicts
from ..errors import UserError
from . import partitions
from .base import BaseEngine, Losses, Measurement, adam_arguments, torch_adam
from .compiled import recomputing
from .processes import join_group


def _nvidia_apex_adam() -> Callable[..., torch.optim.Optimizer]:
    try:
        from apex.optimizers import FusedAdam  # pyrefly: ignore[missing-import] (optional)
    except Exception:  # the namesake on PyPI may fail in any way, at import or for lack of optimizers
        raise UserError(
            "optimizer.implementation: apex asked for, but NVIDIA apex is not installed (the `apex` on PyPI is another project); use torch"
        ) from None
    return FusedAdam


def start(device: torch.device) -> None:
    """Import DeepSpeed, with less to say, and give it the process group; a process that works alone gets a group of one."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # What DeepSpeed logs below errors helps its developers only. It reads these when it is first imported.
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("LOG_LEVEL", "error")
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it, launcher or not
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    # DeepSpeed would spend a minute compiling a shared-memory collective for CPU inference, which training never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # torch has renamed two collectives that DeepSpeed calls; a user can do nothing about it.
    warnings.filterwarnings("ignore", r".*(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", FutureWarning)
    if not torch.distributed.is_initialized():
        join_group(device, 0, 1, None)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)


def build_optimizer(networks: dict[str, nn.Module], config: Config, device: torch.device) -> torch.optim.Optimizer:
    """One optimiser with a parameter group per trained network, under the network's name.

    Raises:
        UserError: the asked-for implementation cannot run here.
    """
    settings = config.optimizer
    decoupled = settings.kind == "adamw"
    groups = [
        {"params": trained, "name": name}
        for name, network in networks.items()
        if (trained := [p for p in network.parameters() if p.requires_grad])
    ]
    if settings.implementation == "torch":
        return torch_adam(groups, settings)
    arguments = adam_arguments(settings)
    try:
        if settings.implementation == "apex":
            return _nvidia_apex_adam()(groups, adam_w_mode=decoupled, **arguments)
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        if device.type == "cpu":
            cache = os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")
            print(f"DeepSpeed compiles its Adam once; if this never ends, a killed build left a file `lock` under {cache}", flush=True)
            return DeepSpeedCPUAdam(groups, adamw_mode=decoupled, **arguments)
        return FusedAdam(groups, adam_w_mode=decoupled, **arguments)
    except UserError:
        raise
    except Exception as error:  # a just-in-time build can fail in many ways
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"optimizer.implementation: {settings.implementation} cannot run here ({reason}); use torch") from None


def build_optimizers(networks: dict[str, nn.Module], config: Config, device: torch.device) -> dict[str, torch.optim.Optimizer | None]:
    """The optimiser of each engine, by the engine's name; None where nothing is trained. Errors as `build_optimizer`."""
    inside = {"both": networks} if config.engine.zero_stage < 3 else {name: {name: network} for name, network in networks.items()}
    return {
        name: build_optimizer(held, config, device) if any(p.requires_grad for n in held.values() for p in n.parameters()) else None
        for name, held in inside.items()
    }


class _Remote:
    """The denoiser where it has a DeepSpeed engine of its own, as the step calls it from within the encoder's engine.

    The step gets a copy of the output that no gradient flows through. Once the encoder's backward has left d loss / d output at that copy,
    `backward` carries it on into the denoiser: of all that the two engines share, the output is the only thing that has a gradient.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self._outputs: list[tuple[Tensor, Tensor]] = []

    def __call__(self, *inputs: Tensor, **options: Any) -> Tensor:
        output = self.engine(*inputs, **options)
        if not output.requires_grad:
            return output
        leaf = output.detach().requires_grad_()
        self._outputs.append((output, leaf))
        return leaf

    def backward(self) -> None:
        outputs, self._outputs = self._outputs, []
        product = sum((output * leaf.grad).sum() for output, leaf in outputs if leaf.grad is not None)
        # The encoder's engine has divided by the number of micro-batches already.
        self.engine.backward(product, scale_wrt_gas=False)


class _EncoderStep(nn.Module):
    """What the encoder's own DeepSpeed engine wraps: called, it takes the step around both networks.

    DeepSpeed takes charge of every parameter of the module that it wraps. The denoiser has another engine, so the step comes as a function:
    as a submodule it would bring the denoiser along.
    """

    def __init__(self, encoder: nn.Module, step: Callable[..., Any]) -> None:
        super().__init__()
        self.encoder, self.step = encoder, step

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.step(*arguments, **options)


class Engine(BaseEngine):
    """Both networks in DeepSpeed: in one engine, or at ZeRO stage 3 in one each, which share nothing but the denoiser's output.

    Args:
        step: Holds both networks; called with the step's arguments and `denoiser`, what takes the place of its own denoiser or None, it
            returns (loss to differentiate, measurements [M]).
        networks: Encoder and partner by name.
        optimizers: From `build_optimizers`.
        config: The run's settings.
    """

    def __init__(
        self, step: nn.Module, networks: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer | None], config: Config
    ) -> None:
        import deepspeed

        super().__init__(networks, config)
        self._linear = nn.functional.linear  # for which ZeRO 3 puts one of its own, that has no forward derivatives, and leaves it there
        self.engines: dict[str, Any] = {}
        for name, settings in deepspeed_dicts(config, self.world_size).items():
            wrapped = {"both": step, "encoder": _EncoderStep(networks["encoder"], step.forward)}.get(name) or networks[name]
            learning = [p for p in wrapped.parameters() if p.requires_grad] or list(wrapped.parameters())
            settings["zero_optimization"] |= _sizes(settings["zero_optimization"]["stage"], learning)
            for p in wrapped.parameters():  # DeepSpeed views weights as bytes, which `accelerate` may have laid out channels-last
                p.data = p.data.contiguous()
            self.engines[name], *_ = deepspeed.initialize(model=wrapped, optimizer=optimizers[name], config=settings)
        self._remote = _Remote(self.engines["denoiser"]) if "denoiser" in self.engines else None
        self.denoiser = recomputing(self._remote, config) if self._remote else None  # takes the place of the step's own, if there is one
        self._around_step = next(iter(self.engines.values()))
        self._learning = [engine for name, engine in self.engines.items() if optimizers[name] is not None]
        averaged = self._trained if config.optimizer.ema_decay > 0 else {}
        self._averaged_parts = [partitions.local(p) for p in averaged.values()]
        self.averaged = {name: part.detach().clone() for name, part in zip(averaged, self._averaged_parts, strict=True)}

    def losses(
        self, x_0: Tensor, draw: Any, kl_weight: float, phase: str, denoiser: Callable[..., Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._around_step(x_0, draw, kl_weight, phase, denoiser=denoiser or self.denoiser)

    def update(self, step: int, losses: Callable[[int], Losses]) -> Measurement:
        for engine in self._learning:
            for group in engine.optimizer.param_groups:
                group["lr"] = self.learning_rate(group["name"], step)
        measured: list[Tensor] = []
        micro_batches = self.config.engine.gradient_accumulation
        for micro in range(micro_batches):
            loss, found, *_ = losses(micro)
            measured.append(found)
            self._around_step.backward(loss)
            if self._remote is not None and self._remote.engine in self._learning:
                self._remote.backward()
                if micro + 1 == micro_batches and self.config.optimizer.clip > 0:
                    self._share_clip()
            for engine in self._learning:
                engine.step()
        if self.averaged:
            self._average(step, list(self.averaged.values()), self._averaged_parts)
        return self._measured(sum(measured[1:], start=measured[0]))

    def _share_clip(self) -> None:
        """Each engine clips by its own norm. Set its limit so that it shrinks its gradients as much as the norm over both asks for."""
        norms = [partitions.gradient_norm(engine).item() for engine in self._learning]
        both = math.hypot(*norms)
        for engine, norm in zip(self._learning, norms, strict=True):
            partitions.set_clip(engine, self.config.optimizer.clip * (norm + 1e-6) / (both + 1e-6) if math.isfinite(both) else 1.0)

    def close(self) -> None:
        super().close()
        nn.functional.linear = self._linear

    def _refresh(self) -> None:
        for engine in self._learning:
            partitions.refresh(engine)

    def _engine_of(self, name: str) -> Any:
        return self.engines.get(name.partition(".")[0], self._around_step)

    def _moment(self, name: str, moment: str) -> Tensor:
        return partitions.whole_moment(self._engine_of(name), self._trained[name], moment)

    def _begin_restoring(self) -> None:
        for engine in self._learning:
            partitions.start(engine)

    def _restore(self, name: str, weight: Tensor, moments: dict[str, Tensor]) -> None:
        partitions.restore(self._engine_of(name), self._trained[name], weight, moments)

    def _steps_taken(self) -> int:
        return partitions.steps_taken(self._learning[0])  # two engines have the same count: both take every step

    def _set_steps_taken(self, count: int) -> None:
        for engine in self._learning:
            partitions.set_steps_taken(engine, count)


def _sizes(stage: int, parameters: list[nn.Parameter]) -> dict[str, int]:
    """Sizes that DeepSpeed would guess for networks of billions of parameters."""
    total = sum(p.numel() for p in parameters)
    bucket = bucket_elements(total)
    if stage < 3:
        return {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    vectors = max((p.numel() for p in parameters if p.dim() < 2), default=0)
    return {
        "reduce_bucket_size": bucket,
        "stage3_prefetch_bucket_size": min(50_000_000, total),
        "stage3_param_persistence_threshold": vectors,  # biases and norms, a small share of all weights, stay whole
    }
