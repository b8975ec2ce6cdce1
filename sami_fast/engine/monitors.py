"""Where a run's numbers can be watched beside its log: TensorBoard, CSV and W&B."""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..config import Config


class Monitors:
    """As many of the three as `log` switches on; the first rank's.

    Args:
        config: The run's; TensorBoard and CSV are folders of these names in its folder.
    """

    def __init__(self, config: Config) -> None:
        log = config.log
        self._csv = config.run_dir / "csv" if log.csv else None
        self._tensorboard: Any = None
        self._wandb: Any = None
        if log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(config.run_dir / "tensorboard"))
        if log.wandb:
            import wandb  # pyrefly: ignore[missing-import] (optional; settings are checked for it)

            wandb.init(project="sami-fast", group=config.name)
            self._wandb = wandb

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one step, by name."""
        self.write_files([(step, values)])
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def write_files(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Numbers of many steps, into TensorBoard and CSV alone."""
        for step, values in rows:
            for name, value in values.items():
                if self._tensorboard is not None:
                    self._tensorboard.add_scalar(name, value, step)
                if self._csv is not None:
                    _append(self._csv / f"{name}.csv", name, step, value)
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()  # or another run of this process would go on in this one


def _append(file: Path, name: str, step: int, value: float) -> None:
    begun = file.exists()
    file.parent.mkdir(exist_ok=True)
    with file.open("a", newline="") as stream:
        writer = csv.writer(stream)
        if not begun:
            writer.writerow(["step", name])
        writer.writerow([step, value])
