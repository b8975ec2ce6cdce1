"""What steps cost the network interface of a host, and how long they take: every rank runs `wire_worker.py FOLDER STEPS [rate ...]`.

Rates are those of `tc`, 100mbit; `free` is as fast as the machine can. Each rank writes rank_<n>.json: {stage: {rate: {what: number}}},
numbers of one step.
"""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sami_fast.config import Config, load_config
from sami_fast.engine.processes import leave_distributed, wait_for_all

TINY = Path(__file__).resolve().parents[1] / "tiny.yaml"
STAGES = (0, 1, 2, 3)
SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")
WIDE = [  # much to send, little to compute
    *("encoder.channels=[64,128]", "denoiser.channels=[64,128]", "train.batch_size=12", "train.denoiser_warmup=0"),
    *("optimizer.ema_decay=0", "checkpoint.validation_images=2"),
]
COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "barrier")


def config_of(stage: int, folder: str) -> Config:
    return load_config(str(TINY), [*WIDE, f"engine.zero_stage={stage}", f"runs_dir={folder}", f"name=stage{stage}"])


def counted(calls: Counter[str], name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        calls[name] += 1
        return collective(*arguments, **options)

    return call


def limit(rate: str) -> None:
    """What this host sends from now on."""
    subprocess.run(["tc", "qdisc", "del", "dev", "eth0", "root"], check=False, stderr=subprocess.DEVNULL)
    if rate != "free":
        subprocess.run(f"tc qdisc add dev eth0 root tbf rate {rate} burst 256kb latency 400ms".split(), check=True)
    wait_for_all()


def measure(stage: int, folder: str, steps: int, rates: list[str], calls: Counter[str]) -> dict[str, dict[str, float]]:
    """Means of some steps after the first two: stage 3 has to see first in which order layers run."""
    from sami_fast.train import Trainer

    trainer, found = Trainer(config_of(stage, folder), resume=False, overwrite=True), {}
    for rate in rates:
        limit(rate)
        for step in range(-2, steps):
            if step == 0:
                wait_for_all()
                calls.clear()
                sent, began = int(SENT.read_text()), time.monotonic()
            trainer.update()[1].read()
            trainer.step += 1
        seconds = time.monotonic() - began
        found[rate] = {"sent": (int(SENT.read_text()) - sent) / steps, "seconds": seconds / steps}
        found[rate] |= {name: count / steps for name, count in calls.items()}
    limit("free")
    trainer.feed.close()
    trainer.run_folder.release()
    return found


def main(folder: str, steps: str, *rates: str) -> None:
    calls: Counter[str] = Counter()
    for name in COLLECTIVES:  # before DeepSpeed looks them up
        setattr(dist, name, counted(calls, name, getattr(dist, name)))
    found = {stage: measure(stage, f"{folder}/runs", int(steps), list(rates), calls) for stage in STAGES}
    Path(folder, f"rank_{dist.get_rank()}.json").write_text(json.dumps(found))
    leave_distributed()


if __name__ == "__main__":
    main(*sys.argv[1:])
