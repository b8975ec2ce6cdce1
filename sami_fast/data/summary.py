"""What a config will feed, in words: counts, sizes, formats, who decodes what and why, and how fast the feed alone is."""

import math
import time
from collections import Counter
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from ..config import Config
from . import open_dataset
from .decoded import Decoded
from .feed import Dataset, Feed
from .image_folder import ImageFolder
from .index import shown
from .video_folder import VideoFolder

SHOWN_BAD = 10


def _sizes(sizes: list[tuple[int, int]]) -> str:
    """Widths and heights: all the same, or smallest, middle and largest by area."""
    ordered = sorted(sizes, key=lambda size: size[0] * size[1])
    picked = dict.fromkeys((ordered[0], ordered[len(ordered) // 2], ordered[-1]))
    return " to ".join(f"{width}x{height}" for width, height in picked) + (f", {len(set(sizes))} different" if len(set(sizes)) > 1 else "")


def _files(dataset: Decoded) -> dict[str, Any]:
    index = dataset.index
    facts: dict[str, Any] = {"folder": str(index.folder), "files": len(index.names)}
    if isinstance(dataset, VideoFolder):
        videos = dataset.videos
        facts["pixels"] = _sizes([(v.width, v.height) for v in videos])
        facts["frames"] = f"{sum(v.frames for v in videos)}, {min(v.frames for v in videos)} to {max(v.frames for v in videos)} in a video"
        rates = [v.fps for v in videos if v.fps]
        facts["frames per second"] = f"{median(rates):.4g} (median), {min(rates):.4g} to {max(rates):.4g}" if rates else "unknown"
        facts["clips held out"] = None  # filled in from the evaluation split
        formats = [v.codec for v in videos]
    elif isinstance(dataset, ImageFolder):
        facts["pixels"] = _sizes([(width, height) for width, height, *_ in index.facts])
        formats = [fact[2] for fact in index.facts]
    decoders = Counter((form, *dataset.decoder_of(n)) for n, form in enumerate(formats))
    facts["decoders"] = [f"{count} x {form}: {decoder}, {why}" for (form, decoder, why), count in decoders.most_common()]
    facts["ignored"] = f"{index.others} file(s) with other endings"
    facts["unreadable"] = f"{len(index.bad)}" + (f": {shown(index.bad, SHOWN_BAD)}" if index.bad else "")
    if dataset.cache is not None:
        room = (len(index.names) if isinstance(dataset, ImageFolder) else dataset.offsets[-1]) * dataset.cache.record / 2**30
        facts["decoded pixels"] = f"kept in {index.cache}, {room:.2f} GiB when complete; later epochs and runs read them there"
    else:
        facts["decoded pixels"] = "not kept (data.cache_gib)"
    return facts


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
    if not endless:
        shown_per_epoch = getattr(training, "epoch_size", training.size)
        facts["epoch"] = f"{shown_per_epoch} images, {shown_per_epoch / config.train.batch_size:.1f} steps of {config.train.batch_size}"
    if isinstance(training, Decoded):
        facts |= _files(training)
        if isinstance(evaluation, VideoFolder):
            facts["clips held out"] = f"{evaluation.num_clips} of {evaluation.clip_length} frames"
    elif config.data.path:
        facts["file"] = config.data.path
    return facts, training


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
    workers = getattr(dataset, "workers", 0)
    how = f"{workers} worker(s), nothing from kept pixels" if workers else "made when asked for"
    return f"{step * config.train.batch_size / spent:.0f} images/s over {step} batches of {config.train.batch_size}, {how}"
