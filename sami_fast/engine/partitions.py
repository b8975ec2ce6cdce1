"""Weights and Adam's moments of each parameter as whole tensors, and back into whatever an engine keeps of them on each rank.

At ZeRO stage 0 every rank keeps everything whole. At stages 1 and 2 weights are whole, but Adam's moments and the float32 copy of the
weights that Adam updates are split over the ranks. At stage 3 the weights are split too. Checkpoints made of whole tensors can be read at
any stage by any number of ranks. DeepSpeed's own files cannot, and its converter to whole tensors treats several parameter groups as one.
"""

from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


class Partitioned(nn.Parameter):
    """A parameter at ZeRO stage 3, for type checkers: what DeepSpeed adds to it."""

    ds_tensor: Tensor  # this rank's part: flat, as long on every rank, padded on the last
    ds_numel: int  # of the whole weight
    ds_shape: torch.Size


def is_partitioned(parameter: nn.Parameter) -> TypeGuard[Partitioned]:
    """Whether this rank holds only a part of a weight, as at ZeRO stage 3."""
    return hasattr(parameter, "ds_tensor")


def local(parameter: nn.Parameter) -> Tensor:
    """What this rank keeps of a weight: its part, or all of it."""
    return parameter.ds_tensor if is_partitioned(parameter) else parameter


def local_values(parameter: nn.Parameter) -> Tensor:
    """What this rank keeps of a weight, without padding, which nobody has written and which may hold NaN. Empty where all is padding."""
    if not is_partitioned(parameter):
        return parameter
    size = parameter.ds_tensor.numel()
    return parameter.ds_tensor[: max(0, parameter.ds_numel - size * torch.distributed.get_rank())]


def whole(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """A tensor of the parameter's shape, put together from the parts of all ranks. Every rank has to call it, with its part."""
    if not is_partitioned(parameter):
        return part
    part = part.detach().to(parameter.device).contiguous()
    parts = part.new_empty(torch.distributed.get_world_size() * part.numel())
    torch.distributed.all_gather_into_tensor(parts, part)
    return parts[: parameter.ds_numel].view(parameter.ds_shape)


def part_of(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """This rank's part of a whole tensor of the parameter's shape, padded with zeros."""
    if not is_partitioned(parameter):
        return value
    size = parameter.ds_tensor.numel()
    padded = value.new_zeros(size * torch.distributed.get_world_size())
    padded[: value.numel()] = value.flatten()
    return padded[size * torch.distributed.get_rank() :][:size]


def whole_like(parameter: nn.Parameter) -> Tensor:
    """A tensor of the whole weight's shape and dtype that takes no memory."""
    return torch.empty(parameter.ds_shape if is_partitioned(parameter) else parameter.shape, dtype=parameter.dtype, device="meta")


def whole_weight(parameter: nn.Parameter) -> Tensor:
    """A weight in its own shape. Every rank has to call it."""
    return whole(parameter, local(parameter).detach())


def refresh(engine: Any) -> None:
    """Make stage 3 use what was written to the parts of its weights.

    Some weights also lie whole on every rank, small ones all the time. These copies are dropped, and those of small ones made again.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "persistent_parameters"):
        optimizer._partition_all_parameters()
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def whole_moment(engine: Any, parameter: nn.Parameter, name: str) -> Tensor:
    """One of Adam's moments, in the parameter's shape. Every rank has to call it."""
    from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

    if is_partitioned(parameter):
        return whole(parameter, safe_get_local_optimizer_state(parameter, name))
    if hasattr(parameter, "_hp_mapping"):
        _link(engine)
        return safe_get_full_optimizer_state(parameter, name)  # pyrefly: ignore[bad-return] (None only without moments)
    return engine.optimizer.state[parameter][name]


def restore(engine: Any, parameter: nn.Parameter, weight: Tensor, moments: dict[str, Tensor]) -> None:
    """Write a parameter's weight and moments, from whole tensors, into whatever DeepSpeed keeps of them. `start` comes before."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    with torch.no_grad():
        local(parameter).copy_(part_of(parameter, weight))
        for name, moment in moments.items():
            if is_partitioned(parameter):
                safe_set_local_optimizer_state(parameter, part_of(parameter, moment), name)
            elif hasattr(parameter, "_hp_mapping"):
                safe_set_full_optimizer_state(parameter, moment, name)
            else:
                engine.optimizer.state[parameter][name].copy_(moment)
        if is_partitioned(parameter):
            safe_set_local_fp32_param(parameter, part_of(parameter, weight))
        elif hasattr(parameter, "_hp_mapping"):
            safe_set_full_fp32_param(parameter, weight)


def start(engine: Any) -> None:
    """Let an engine make Adam's moments, which exist only after a first step: take one at learning rate 0 with gradients of 0."""
    optimizer = engine.optimizer
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    flats = _flat_copies(optimizer)
    for place, flat in enumerate(flats):
        flat.grad = torch.zeros_like(flat)
        optimizer._optimizer_step(place)
        if not getattr(optimizer, "offload_optimizer", False) and not getattr(optimizer, "cpu_offload", False):
            flat.grad = None
    if not flats:
        for parameter in _parameters(optimizer):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    _link(engine)


def steps_taken(engine: Any) -> int:
    """How many steps Adam has taken, which is one number for all parameters of an engine."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    counts = {int(group["step"]) for group in optimizer.param_groups if "step" in group}
    counts |= {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    (count,) = counts
    return count


def set_steps_taken(engine: Any, count: int) -> None:
    """Make Adam believe that it has taken `count` steps."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for holder in (*optimizer.param_groups, *optimizer.state.values()):
        if "step" in holder:
            holder["step"] = holder["step"].fill_(count) if isinstance(holder["step"], Tensor) else count


def gradient_norm(engine: Any) -> Tensor:
    """Norm of an engine's gradients over all ranks; to be called between its backward and its step."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "_get_norm_groups"):  # stage 3
        return torch.stack([torch.as_tensor(norm, dtype=torch.float32).cpu() for norm in optimizer._get_norm_groups()]).norm()
    if hasattr(optimizer, "scaled_global_norm"):  # stages 1 and 2
        return torch.as_tensor(optimizer.scaled_global_norm(), dtype=torch.float32).cpu()
    return torch.stack([p.grad.norm() for p in _parameters(optimizer) if p.grad is not None]).norm().cpu()


def set_clip(engine: Any, clip: float) -> None:
    """The norm above which an engine shrinks its gradients in its next step."""
    engine._config.gradient_clipping = clip
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = clip


def _flat_copies(optimizer: Any) -> list[Tensor]:
    """The float32 weights that Adam updates at stages 1 to 3, one flat tensor per parameter group; none at stage 0."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return []


def _parameters(optimizer: Any) -> Iterable[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _link(engine: Any) -> None:
    """Tell the parameters of stages 1 and 2 where their moments are. DeepSpeed does so once, after the first group's first step, and would
    miss those of the other groups."""
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
