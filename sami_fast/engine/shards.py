"""Whole tensors out of what ZeRO keeps in parts, and back: weights and Adam's moments of each parameter, whatever the stage.

DeepSpeed's stage 0 keeps everything whole; stages 1 and 2 keep float32 copies and moments in parts; stage 3 also the weights, as flat
parts of equal length (`ds_tensor`), the last of them padded. A checkpoint made of whole tensors can be read at any stage by any number of
ranks. DeepSpeed's own files cannot, and its converter to such ones takes all parameter groups for one.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether this rank holds a part of a weight only: ZeRO stage 3."""
    return hasattr(parameter, "ds_tensor")


def local(parameter: nn.Parameter) -> Tensor:
    """What this rank keeps of a weight: its flat part, or all of it."""
    return parameter.ds_tensor if is_partitioned(parameter) else parameter


def whole(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """The tensor of a parameter's shape of which every rank gives its part. Every rank calls it."""
    if not is_partitioned(parameter):
        return part
    part = part.detach().to(parameter.device).contiguous()
    parts = part.new_empty(torch.distributed.get_world_size() * part.numel())
    torch.distributed.all_gather_into_tensor(parts, part)
    return parts[: parameter.ds_numel].view(parameter.ds_shape)


def part_of(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """This rank's part of a whole tensor, zeros where it is padded."""
    if not is_partitioned(parameter):
        return value
    size = parameter.ds_tensor.numel()
    padded = value.new_zeros(size * torch.distributed.get_world_size())
    padded[: value.numel()] = value.flatten()
    return padded[size * torch.distributed.get_rank() :][:size]


def whole_weight(parameter: nn.Parameter) -> Tensor:
    """A weight of its own shape. Every rank calls it."""
    return whole(parameter, local(parameter).detach())


def refresh(engine: Any) -> None:
    """Take into use what was written to the parts of stage-3 weights: some also lie whole on every rank, small ones for ever."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "persistent_parameters"):
        optimizer._partition_all_parameters()
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def whole_moment(engine: Any, parameter: nn.Parameter, name: str) -> Tensor:
    """One of Adam's moments of a parameter. Every rank calls it."""
    from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

    if is_partitioned(parameter):
        return whole(parameter, safe_get_local_optimizer_state(parameter, name))
    if hasattr(parameter, "_hp_mapping"):
        _link(engine)
        return safe_get_full_optimizer_state(parameter, name)
    return engine.optimizer.state[parameter][name]


def restore(engine: Any, parameter: nn.Parameter, weight: Tensor, moments: dict[str, Tensor]) -> None:
    """Write a parameter's weight and moments, from whole tensors, into whatever DeepSpeed keeps of them. Needs `start`."""
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
    """Make an engine's moments, which Adam makes in its first step only: a step of length zero on gradients of zero."""
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
    """Adam's count of its steps, one for all parameters of an engine."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    counts = {int(group["step"]) for group in optimizer.param_groups if "step" in group}
    counts |= {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    (count,) = counts
    return count


def set_steps_taken(engine: Any, count: int) -> None:
    """Write what `steps_taken` reads."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for holder in (*optimizer.param_groups, *optimizer.state.values()):
        if "step" in holder:
            holder["step"] = holder["step"].fill_(count) if isinstance(holder["step"], Tensor) else count


def gradient_norm(engine: Any) -> Tensor:
    """Norm of an engine's gradients over all ranks, between its backward and its step."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "_get_norm_groups"):  # stage 3
        return torch.stack([torch.as_tensor(norm, dtype=torch.float32).cpu() for norm in optimizer._get_norm_groups()]).norm()
    if hasattr(optimizer, "scaled_global_norm"):  # stages 1 and 2
        return torch.as_tensor(optimizer.scaled_global_norm(), dtype=torch.float32).cpu()
    return torch.stack([parameter.grad.norm() for parameter in _parameters(optimizer)]).norm().cpu()


def set_clip(engine: Any, clip: float) -> None:
    """The norm above which an engine shrinks its gradients in its next step."""
    engine._config.gradient_clipping = clip
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = clip


def _flat_copies(optimizer: Any) -> list[Tensor]:
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return []


def _parameters(optimizer: Any) -> Iterable[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _link(engine: Any) -> None:
    """Stages 1 and 2 look up their moments once, after the first of their groups has stepped: look again for the others."""
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
