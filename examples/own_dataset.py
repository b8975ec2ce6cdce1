"""Training on a dataset of one's own: from Python, or by name from the command.

python examples/own_dataset.py            # some minutes on a CPU core
python examples/own_dataset.py 8          # as many steps, to see it run
python sami_fast/train.py --config disks name=squares data.class=examples/own_dataset.py:Squares data.kwargs.count=5000
"""

import sys

import torch
from torch.utils.data import Dataset

from sami_fast.report import write_report
from sami_fast.train import train


class Squares(Dataset):
    """A bright square somewhere on a dark background. An image depends on its index alone, so that a run can be resumed."""

    def __init__(self, count: int = 2000, size: int = 16) -> None:
        self.count, self.size = count, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        place = torch.Generator().manual_seed(index)
        top, left = torch.randint(0, self.size - 5, (2,), generator=place).tolist()
        image = torch.zeros(1, self.size, self.size, dtype=torch.uint8)  # bytes, or floats in [-1, 1]
        image[:, top : top + 5, left : left + 5] = 255
        return image, index  # what follows an image, such as a label, is not looked at


if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
    settings = {"name": "squares", "train.steps": steps, "train.denoiser_steps": max(1, steps // 4)}
    folder = train("disks", dataset=Squares(), settings=settings, resume=True)
    print(write_report(folder, dataset=Squares()) if steps > 100 else folder)
