"""What a config will feed, in words: counts, sizes, formats, who decodes what and why, and how fast the feed alone is."""

import math
import time
from dataclasses import replace
from typing import Any

import torch

from ..config import Config
from . import open_dataset
from .dataset import Dataset
from .feed import Feed


def summarize(config: Config) -> tuple[dict[str, Any], Dataset]:
    """Facts by name, in the order of reading, and the training images.

    Raises:
        UserError: the data cannot be used as they are.
    """
    training, evaluation = (open_dataset(config.data, config.seed, split) for split in (0, 1))
    channels, height, width = training.image_shape
    endless = training.size is None
    facts: dict[str, Any] = {
        "kind": config.data.kind,
        "images": f"{width}x{height} pixels, {channels} channel(s)",
        "training": "endless" if endless else f"{training.size} images",
        "evaluation": "endless, never those of training" if endless else f"{evaluation.size} images",
        "factors": ", ".join(training.factor_names) or "unknown",
    }
    if training.epoch_size is not None:
        steps = training.epoch_size / config.train.batch_size
        facts["epoch"] = f"{training.epoch_size} images, {steps:.1f} steps of {config.train.batch_size}"
    if evaluation.num_clips is not None:
        facts["clips held out"] = f"{evaluation.num_clips} of {evaluation.clip_length} frames"
    found = training.facts()
    if config.data.path and not found:
        facts["file"] = config.data.path
    return facts | found, training


def throughput(config: Config, seconds: float) -> str:
    """Images per second of the feed alone from its start, for a time or one epoch, with nothing read from kept pixels."""
    dataset = open_dataset(replace(config.data, cache_gib=0.0), config.seed)
    feed = Feed(dataset, config.train.batch_size, 1, 0, 1, config.seed, torch.device("cpu"), config.data.flip)
    steps = math.inf if feed.epoch_size is None else max(1, feed.epoch_size // config.train.batch_size)
    begin, step, spent = time.perf_counter(), 0, 0.0
    try:
        while spent < seconds and step < steps:
            feed.micro_batch(step, 0)
            step, spent = step + 1, time.perf_counter() - begin
    finally:
        feed.close()
    how = f"{dataset.workers} worker(s), nothing from kept pixels" if dataset.workers else "made when asked for"
    return f"{step * config.train.batch_size / spent:.0f} images/s over {step} batches of {config.train.batch_size}, {how}"
