"""What every rank of a real launcher holds and sends in one step: `deepspeed --num_accelerators 2 plan_worker.py FOLDER`.

Each rank writes rank_<n>.json: {stage: {what: bytes}}.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from sami_fast.config import Config, load_config

HERE = Path(__file__).resolve().parent
STAGES = (0, 1, 2, 3)
OVERRIDES = [
    "encoder.channels=[32,64]",
    "denoiser.channels=[16,48]",
    "train.batch_size=16",
    "train.denoiser_warmup=0",
    "engine.gradient_accumulation=2",
]


def config_of(stage: int, folder: str) -> Config:
    return load_config(str(HERE / "tiny.yaml"), [*OVERRIDES, f"engine.zero_stage={stage}", f"runs_dir={folder}", f"name=stage{stage}"])


SENT_BY = {"all_reduce": 2, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}  # in units of (ranks - 1) / ranks of the whole


class Ring:
    """Bytes that this rank would send if every collective were a ring; must stand before DeepSpeed looks the collectives up."""

    def __init__(self) -> None:
        self.sent = 0.0
        for name, share in SENT_BY.items():
            setattr(dist, name, self._counted(getattr(dist, name), share))

    def _counted(self, collective: Callable[..., Any], share: int) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            tensors = [a for a in (*arguments, *options.values()) if isinstance(a, torch.Tensor)]
            whole = max(t.numel() * t.element_size() for t in tensors)  # a gather's output, a scatter's input
            self.sent += share * (dist.get_world_size() - 1) / dist.get_world_size() * whole
            return collective(*arguments, **options)

        return call


def held(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of memory behind tensors, each counted once."""
    storages = [t.untyped_storage() for t in tensors if t is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}.values())


def measure(stage: int, folder: str, ring: Ring) -> dict[str, float]:
    """The second optimiser step, of two micro-batches: in the first, stage 3 has yet to see in which order layers run."""
    from sami_fast.train import Trainer

    trainer = Trainer(config_of(stage, folder), resume=False, overwrite=False)
    optimizers = [engine.optimizer for engine in trainer.engine.engines.values()]
    parameters, found = list(trainer.model.parameters()), {}

    def parts(name: str) -> list[torch.Tensor]:
        """What an optimiser of DeepSpeed's keeps under this name, in whichever nesting."""
        return [t for optimizer in optimizers for t in tree_leaves(getattr(optimizer, name, None)) if isinstance(t, torch.Tensor)]

    def losses(micro: int) -> tuple[torch.Tensor, torch.Tensor]:
        if micro == 1:  # between the two micro-batches, what gradients are kept
            found["gradients"] = held([*(p.grad for p in parameters), *parts("all_grad_tensors"), *parts("grad_partitions_flat_buffer")])
        return trainer._losses(micro, 0.1, "both")

    trainer.engine.update(0, losses)
    ring.sent = 0.0
    trainer.engine.update(1, losses)
    found["sent"] = ring.sent
    found["weights"] = held(getattr(p, "ds_tensor", p) for p in parameters)
    moments = [
        t
        for optimizer in optimizers
        for kept in getattr(optimizer, "optimizer", optimizer).state.values()
        for t in kept.values()
        if isinstance(t, torch.Tensor) and t.numel() > 1
    ]
    found["optimizer"] = held([*moments, *parts("single_partition_of_fp32_groups")])
    found["averaged"] = held(trainer.engine.averaged.values())
    found["buckets"] = 4 * sum(getattr(optimizer, "reduce_bucket_size", 0) for optimizer in optimizers)
    trainer.feed.close()
    trainer.run_folder.release()
    return found


def main(folder: str) -> None:
    ring = Ring()
    found = {stage: measure(stage, folder, ring) for stage in STAGES}
    Path(folder, f"rank_{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[-1])
