"""One rank of a plain loop around DistributedDataParallel; tests/test_own_loop.py gives it its rank, their number, a folder to write to."""

import sys

import torch
from helpers import tiny_denoiser, tiny_encoder
from torch.nn.parallel import DistributedDataParallel

from sami_fast.methods.sami import Sami
from sami_fast.schedule import Cosine

OPTIONS = {"kl_weight": 0.3, "noise_levels": 2, "unconditional_weight": 0.2, "free_bits": 0.07, "seed": 5}
STEPS = 3


def make() -> Sami:
    return Sami(tiny_encoder(), tiny_denoiser(), Cosine(-6.0, 4.0))


def images(step: int) -> torch.Tensor:
    """The whole batch of a step. [6, 1, 8, 8]."""
    return torch.rand(6, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step)) * 2 - 1


def train(model: torch.nn.Module, part: slice) -> dict[str, torch.Tensor]:
    """A few plain steps on a part of each batch. Returns the weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(images(step)[part], **OPTIONS).backward()
        optimizer.step()
    return {name.removeprefix("module."): p.detach().clone() for name, p in model.named_parameters()}


def main(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    each = 6 // ranks
    model = make()
    weights = train(DistributedDataParallel(model), slice(rank * each, (rank + 1) * each))
    torch.save(weights, f"{folder}/weights_{rank}.pt")
    if rank == 0:  # validates alone, while the others have gone
        with torch.no_grad():
            model.eval().loss(images(0), **OPTIONS)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
