"""DALI pipelines: encoded images and runs of frames in, 8-bit RGB out.

Which image stands where in which batch is decided by the feed, so that it depends neither on DALI nor on the number of ranks; a pipeline
is handed the encoded bytes and keeps nothing between two calls. On a CPU each worker thread runs a pipeline of its own with one thread,
and cropping and resizing is left to `pixels.resize`, which is several times faster there than DALI's (docs/data.md) and the same for both
decoders. On a GPU decoding (nvJPEG, NVDEC), cropping and resizing run in the pipeline. Memory is handed to torch without a copy.
"""

import threading
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .pixels import Box

MAX_BATCH = 256


@cache
def available() -> bool:
    """Whether DALI is installed. (A placeholder package of the name `nvidia-dali` holds nothing.)"""
    try:
        return find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


class DaliDecoder:
    """Decodes on the CPU, or on one GPU.

    Args:
        device_id: CUDA device; None is the CPU.
        size: Height and width that a GPU pipeline resizes to, in pixels.
        resize_inside: Crop and resize in the pipeline; always so on a GPU.
    Raises:
        UserError: DALI is not installed.
    """

    def __init__(self, device_id: int | None, size: int, *, resize_inside: bool | None = None) -> None:
        if not available():
            raise UserError("data.decoder: dali is asked for, but DALI is not installed; `pip install 'sami-fast[feed]'`, or decoder torch")
        self.device_id, self.size = device_id, size
        self.resize_inside = device_id is not None if resize_inside is None else resize_inside
        self._pipelines = threading.local()  # a pipeline serves one thread

    def images(self, encoded: Sequence[np.ndarray], boxes: Sequence[Box]) -> list[Tensor]:
        """Decode image files, given as bytes, [n] uint8 each.

        Returns:
            [H, W, 3] uint8 each, or [size, size, 3] where the pipeline resizes; valid until this thread's next call.
        Raises:
            RuntimeError: one of them cannot be decoded; which one, DALI does not say.
        """
        return self._run("image", {"encoded": encoded}, boxes)

    def frames(self, encoded: np.ndarray, wanted: Sequence[int], box: Box) -> Tensor:
        """Decode frames, by ascending number, of a video file given as bytes. [F, H, W, 3] uint8; else as `images`."""
        return self._run("video", {"encoded": [encoded], "frames": [np.asarray(wanted, np.int32)]}, [box])[0]

    def _run(self, kind: str, inputs: dict[str, Any], boxes: Sequence[Box]) -> list[Tensor]:
        pipeline = getattr(self._pipelines, kind, None)
        if pipeline is None:
            pipeline = self._build(kind)
            setattr(self._pipelines, kind, pipeline)
        if self.resize_inside:
            corners = np.array(boxes, np.float32)
            start = np.ascontiguousarray(corners[:, :2])
            inputs = inputs | {"start": start, "stop": start + corners[:, 2:]}
        for name, value in inputs.items():
            pipeline.feed_input(name, value)
        (output,) = pipeline.run()
        return [torch.from_dlpack(output[place]) for place in range(len(output))]

    def _build(self, kind: str) -> Any:
        dali: Any = import_module("nvidia.dali")  # Any: its stubs lack half of what is used here
        fn, types = dali.fn, dali.types
        device = "cpu" if self.device_id is None else "mixed"

        @dali.pipeline_def(batch_size=MAX_BATCH, num_threads=1, device_id=self.device_id, prefetch_queue_depth=1, exec_dynamic=True)
        def decode() -> Any:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
            if kind == "image":
                pixels = fn.decoders.image(encoded, device=device, output_type=types.RGB)
            else:
                frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
                pixels = fn.decoders.video(encoded, device=device, frames=frames)
            if self.resize_inside:
                corners = [fn.external_source(name=name, dtype=types.FLOAT, ndim=1) for name in ("start", "stop")]
                pixels = fn.resize(
                    pixels,
                    size=[self.size, self.size],
                    roi_start=corners[0],
                    roi_end=corners[1],
                    interp_type=types.INTERP_TRIANGULAR,
                    antialias=True,
                )
            return pixels

        pipeline = decode()
        pipeline.build()
        return pipeline
