"""A finished run, read from its folder."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Config, load_config
from ..data import Dataset, open_dataset
from ..data.own import given
from ..errors import UserError
from ..files import open_regular, parse_json
from ..methods.latent_model import LatentModel
from ..methods.registry import load_model
from ..metrics.checks import LARGEST
from ..progress import bar

TRAIN_IMAGES = 4000
READ_TOGETHER = 256  # images
VALUES_PER_BATCH = 1 << 18  # pixels of one batch of encodings
MOST_LINE = 2**20  # letters of a line of the log
ROW = ("step", "loss_nats", "kl_nats", "kl_weight", "images_per_second", "seconds")  # numbers in every row of training
PER_DIM = ("kl_per_dim", "information_per_dim")  # lists of numbers, the second not in the rows of earlier versions


@dataclass(frozen=True)
class Run:
    """What a run folder holds, and the data it refers to."""

    folder: Path
    config: Config
    environment: dict[str, Any]
    log: list[dict[str, Any]]  # rows of training, oldest first; rows of checkpoints are left out
    model: LatentModel
    train: Dataset
    evaluation: Dataset
    chosen: Tensor  # [N] int64, the evaluation images that scores are computed from
    chosen_train: Tensor  # [M] int64, the training images that evaluation may look at

    @property
    def batch_size(self) -> int:
        """Images that are encoded together."""
        return max(1, VALUES_PER_BATCH // math.prod(self.evaluation.image_shape))

    def index(self) -> tuple[Tensor, ...]:
        """The evaluation images in batches. [n] int64 each."""
        return torch.arange(self.count).split(self.batch_size)

    def images(self, index: Tensor) -> Tensor:
        """Evaluation images on the model's device. [n] int64, below `count` -> [n, C, H, W] in [-1, 1]."""
        return self.evaluation.images(self.chosen[index]).to(self.model.device)

    def factors(self) -> Tensor:
        """Factors of the evaluation images. [N, F] float32."""
        return self.evaluation.factors(self.chosen)

    def train_images(self, index: Tensor) -> Tensor:
        """Training images, [n] int64, below `num_train` -> as `images`."""
        return self.train.training_images(self.chosen_train[index]).to(self.model.device)

    @property
    def count(self) -> int:
        """Evaluation images that scores are computed from."""
        return len(self.chosen)

    @property
    def num_train(self) -> int:
        """Training images that evaluation may look at."""
        return len(self.chosen_train)


def evenly(count: int, most: int) -> Tensor:
    """At most so many of the numbers below `count`, at equal distances. [n] int64."""
    return torch.linspace(0, count - 1, min(most, count), dtype=torch.float64).round().long()


def places(dataset: Dataset, count: int) -> Tensor:
    """Which images, at most `count`, stand for a dataset: the first of an endless one, frames of videos at equal distances, of others a
    fixed random choice.

    Sets that hold every combination of their factors, and folders, are sorted: their first images show little of them.
    """
    if dataset.size is None:
        return torch.arange(count)
    count = min(count, dataset.size)
    if dataset.clip_length:  # in their order, since videos are decoded from one keyframe to the next
        return dataset.in_order()[evenly(dataset.size, count)]
    return torch.randperm(dataset.size, generator=torch.Generator().manual_seed(0))[:count]


def readable(dataset: Dataset, index: Tensor) -> Tensor:
    """Those of the images that can be read: none may stand for another beside the factors of that one.

    Raises:
        UserError: there are none.
    """
    if len(index) and dataset.complete:
        return index
    there = []
    with bar(len(index), "reading", "images") as progress:
        for part in index.split(READ_TOGETHER):
            _, absent = dataset.read(part)
            there.append(part[[place not in absent for place in range(len(part))]])
            progress.update(len(part))
    if not sum(map(len, there)):
        raise UserError(f"data.path: none of the {len(index)} evaluation images can be read")
    return torch.cat(there)


def _read(file: Path, what: str) -> str:
    try:
        with open_regular(file) as stream:
            return stream.read().decode()
    except FileNotFoundError:
        raise UserError(f"{file}: not found; {what}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None


def _read_log(file: Path, model: LatentModel, steps: int) -> list[dict[str, Any]]:
    """Rows of training: of a line that training does not write, such as one cut short by a kill, nothing is believed."""
    rows: list[dict[str, Any]] = []
    for line in _read(file, "expected the log that training writes, a line every log.every steps").splitlines():
        if len(line) > MOST_LINE:
            continue
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if _is_row(row, model) and (rows[-1]["step"] if rows else 0) < row["step"] <= steps:
            rows.append(row)
    if not rows:
        raise UserError(f"{file}: holds no step of training; the run ended before its first log line")
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _is_row(row: Any, model: LatentModel) -> bool:
    """Whether a line of the log is a row of training of this model."""
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return False
    numbers = [row.get(name) for name in (*ROW, *(term.name for term in model.terms))]
    numbers += [row["information_sum_nats"]] if "information_sum_nats" in row else []
    lists = [row[name] for name in PER_DIM if name in row]
    return (
        all(map(_is_number, numbers))
        and PER_DIM[0] in row
        and all(isinstance(each, list) and len(each) == model.latent_size and all(map(_is_number, each)) for each in lists)
    )


def open_run(
    folder: Path,
    images: int | None = None,
    *,
    trust_remote_code: bool = False,
    model: LatentModel | None = None,
    dataset: Any = None,
    device: torch.device | str | None = None,
) -> Run:
    """Read a run folder.

    Args:
        folder: As training leaves it.
        images: Evaluation images to compute scores from, at most as many as there are; as the config says when None.
        trust_remote_code: Whether classes that its model and its config name may be imported, which runs their code.
        model, dataset: Of a run of `sami_fast.train` that was given them: the same again, the model with its weights, which is left in eval
            mode. An iterable begins anew; of a generator that training has used up nothing is left, so make it again.
        device: Where a model that is loaded goes; the first GPU, if there is one, when None.
    Raises:
        UserError: not a run folder, a run without a model yet, no log, files that do not fit together, or a dataset beside a run whose
            config names its data.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: not a run folder; expected config.yaml, metrics.jsonl and model/ there")
    config = load_config(str(folder / "config.yaml"))
    if dataset is not None and config.data.kind != "given":
        raise UserError(f"dataset: expected none, {folder} was trained on data of its config, data.kind {config.data.kind}")
    try:
        environment = parse_json(_read(folder / "environment.json", "expected the description of the machine that training writes"))
        if not isinstance(environment, dict):
            raise ValueError
    except ValueError:
        raise UserError(f"{folder}/environment.json: not what training writes there") from None
    objects = model is not None
    if model is None:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = load_model(folder, trust_remote_code=trust_remote_code).placed(device)
    try:
        with nullcontext() if dataset is None else given(dataset):
            train, evaluation = (open_dataset(config.data, config.seed, split, trust_remote_code=trust_remote_code) for split in (0, 1))
    except UserError as error:  # speaks of settings, which stand in the run's config
        raise UserError(f"{folder}/config.yaml: {error}") from None
    if objects:
        model.eval().know_sizes(evaluation.images(torch.zeros(1, dtype=torch.int64)))
    log = _read_log(folder / "metrics.jsonl", model, config.train.steps)
    if evaluation.image_shape != model.image_shape:
        raise UserError(
            f"{folder}: its model was trained on images of shape {list(model.image_shape)} (C, H, W), its data are now "
            f"{list(evaluation.image_shape)}"
        )
    chosen, chosen_train = readable(evaluation, places(evaluation, images or config.report.images)), places(train, TRAIN_IMAGES)
    return Run(folder, config, environment, log, model, train, evaluation, chosen, chosen_train)
