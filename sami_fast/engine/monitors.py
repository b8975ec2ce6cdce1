"""Where a run's numbers can be watched beside its log: TensorBoard, CSV and W&B."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..config import Config, load_config
from ..errors import UserError, one_line
from ..files import append_text


class Monitors:
    """As many of the three as `log` switches on; the first rank's.

    Args:
        config: The run's; TensorBoard and CSV are folders of these names in its folder.
        folder: Of the run, where it is no longer where the config says.
    """

    def __init__(self, config: Config, folder: Path | None = None) -> None:
        log, folder = config.log, folder or config.run_dir
        self._csv = folder / "csv" if log.csv else None
        self._tensorboard: Any = None
        self._wandb: Any = None
        if log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"))
        if log.wandb:
            import wandb  # pyrefly: ignore[missing-import] (optional; settings are checked for it)

            wandb.init(project="sami-fast", group=config.name)
            self._wandb = wandb

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one step, by name."""
        self.write_files([(step, values)])
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def write_pictures(self, pictures: Mapping[str, Path], step: int) -> None:
        """PNG files by name, into TensorBoard and W&B; a CSV holds none."""
        for name, file in pictures.items():
            if self._tensorboard is not None:
                with Image.open(file) as image:
                    self._tensorboard.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
            if self._wandb is not None:
                self._wandb.log({name: self._wandb.Image(str(file))})

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


def show_report(folder: Path) -> None:
    """The pictures of a run's report, shown where its numbers can be watched.

    Args:
        folder: Of a finished run with a report. W&B gets them as a run of its own in the group of the run's name.
    Raises:
        UserError: a picture cannot be read, or the monitors cannot be written.
    """
    config = load_config(str(folder / "config.yaml"))
    pictures = {f"report/{file.stem}": file for file in sorted((folder / "report").glob("*.png"))}
    if not (pictures and (config.log.tensorboard or config.log.wandb)):
        return
    try:
        monitors = Monitors(config, folder)
        try:
            monitors.write_pictures(pictures, config.train.steps)
        finally:
            monitors.close()
    except Exception as error:  # Pillow's and W&B's are of many kinds
        words = f"{folder}: its report is written, but its pictures cannot be shown in TensorBoard or W&B ({one_line(error)})"
        raise UserError(words) from None


def _append(file: Path, name: str, step: int, value: float) -> None:
    rows = io.StringIO()
    csv.writer(rows).writerows([*([] if file.exists() else [["step", name]]), [step, value]])
    file.parent.mkdir(exist_ok=True)
    append_text(file, rows.getvalue())
