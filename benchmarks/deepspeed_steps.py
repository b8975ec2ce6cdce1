"""Train the networks of configs/celeba64.yaml for some steps through the real launcher, at every ZeRO stage, on generated 64x64 images.

python -m benchmarks.deepspeed_steps --rows deepspeed.jsonl [--steps 60] [--stages 0 1 2 3] [--tiny]

A row per stage: images per second, as metrics.jsonl has them, and the most memory that the GPU had in use. Stages that have a row of this
commit and device are left out. Exit status 0 also where DeepSpeed is not installed, which is said; 1 when a stage fails.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sami_fast

from .machine import address
from .rows import read

TINY = ["encoder.channels=[32,32,32]", "encoder.attention=[16]", "denoiser.channels=[32,32]", "denoiser.attention=[]"]
TINY += ["engine.precision=fp32"]


class MemoryInUse:
    """The most memory in use on the first GPU while the block runs, of all processes together; None without a GPU."""

    def __enter__(self) -> "MemoryInUse":
        self.most: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        command = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while shutil.which(command[0]) and not self._over.wait(0.3):
            said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
            if said.isdigit():
                self.most = max(self.most or 0.0, int(said) * 2**20)


def images(folder: Path, count: int) -> Path:
    """Smooth colour images, uint8, in an .npz that data.kind array reads."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    fine = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear")
    file = folder / "images.npz"
    np.savez(file, images=(255 * fine).byte().permute(0, 2, 3, 1).numpy())
    return file


def run(stage: int, arguments: argparse.Namespace, data: Path, folder: Path) -> dict[str, Any]:
    """One run of the launcher. RuntimeError with the end of its output when it fails."""
    launcher = Path(sys.executable).parent / "deepspeed"
    train = Path(sami_fast.__file__).parent / "train.py"
    batch = 4 if arguments.tiny else 64
    settings = [
        *("data.kind=array", f"data.path={data}", "data.flip=false", "data.image_size=64", f"train.batch_size={batch}"),
        *(f"train.steps={arguments.steps}", f"name=zero_{stage}", f"runs_dir={folder}", f"engine.zero_stage={stage}"),
        *("log.every=10", "log.tensorboard=false", f"checkpoint.every={10 * arguments.steps}", "report.images=16"),
        *("train.denoiser_warmup=0", "report.sample_steps=1", "optimizer.warmup_steps=1", "checkpoint.validation_images=16"),
        *(TINY if arguments.tiny else []),
    ]
    command = [str(launcher), "--num_accelerators", "1", "--log_level", "warning", str(train), "--config", "celeba64", *settings]
    metrics = folder / f"zero_{stage}" / "metrics.jsonl"
    start = time.monotonic()
    with MemoryInUse() as memory, tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(arguments.seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            stop(process)
        output.seek(0)
        said = output.read()
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    rates = [line["images_per_second"] for line in lines if line.get("images_per_second")]
    if not rates:
        raise RuntimeError(said[-1500:])
    # The first figure holds what compiles; the report after the last step is not waited for when time is short.
    rate = float(np.median(rates[1:] or rates))
    return {
        "images_per_second": rate,
        "step_ms": 1e3 * batch / rate,
        "memory_in_use_bytes": memory.most,
        "batch": batch,
        "seconds": time.monotonic() - start,
    }


def stop(process: subprocess.Popen) -> None:
    """The launcher and the ranks that it started, which are a process group of their own."""
    if process.poll() is None:
        os.killpg(process.pid, 15)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--stages", type=int, nargs="+", choices=range(4), default=[0, 1, 2, 3])
    parser.add_argument("--seconds", type=float, default=90.0, help="a stage may take (default: %(default)g)")
    parser.add_argument("--tiny", action="store_true", help="small networks in float32: a rehearsal")
    arguments = parser.parse_args()
    if find_spec("deepspeed") is None:
        print("not installed: deepspeed")
        return 0
    where = address("cuda" if torch.cuda.is_available() else "cpu", "python -m benchmarks.deepspeed_steps --rows FILE")
    where |= {"tiny": arguments.tiny, "deepspeed": metadata.version("deepspeed")}
    known = read([arguments.rows]) if arguments.rows.exists() else []
    here = [row for row in known if all(row.get(name) == where[name] for name in ("device", "tiny", "commit"))]
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        data = images(Path(folder), 64 if arguments.tiny else 2048)
        for stage in arguments.stages:
            if any(row["zero_stage"] == stage for row in here):
                continue
            try:
                row = {"op": "deepspeed celeba64", "zero_stage": stage, **run(stage, arguments, data, Path(folder)), **where}
            except RuntimeError as error:
                faults += 1
                print(f"ZeRO {stage} failed:\n{error}", file=sys.stderr, flush=True)
                continue
            with arguments.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
            here.append(row)
    for row in sorted(here, key=lambda row: row["zero_stage"]):
        memory = f"{row['memory_in_use_bytes'] / 2**30:.2f} GiB in use" if row["memory_in_use_bytes"] else "no GPU"
        print(f"ZeRO {row['zero_stage']}  {row['images_per_second']:8.1f} images/s  {row['step_ms']:8.1f} ms a step  {memory}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
