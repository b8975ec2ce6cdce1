"""Trains the tiny run on every rank of a real launcher, once per variant.

deepspeed --num_accelerators 2 ranks_worker.py FOLDER [part]
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from sami_fast import turning
from sami_fast.config import Config, load_config
from sami_fast.engine import base
from sami_fast.engine.capture import WAIT, Captured
from sami_fast.engine.partitions import is_partitioned, local
from sami_fast.errors import NonFiniteError, UserError
from sami_fast.train import Trainer, train

HERE = Path(__file__).resolve().parent
# Free bits and the controller both use the KL of the whole batch: they would show a rank that looks at its own part only. The clipping
# always bites: two engines must shrink their gradients by one norm.
COMMON = [
    "train.batch_size=16",
    "objective.noise_levels=2",
    "objective.free_bits=0.02",
    "kl_weight.kind=controller",
    "kl_weight.target=1",
    "kl_weight.gain=0.1",
    "optimizer.clip=0.5",
    "checkpoint.keep_last=3",
    "train.turn=[0.3,0.6]",  # of a joint run at steps 6 and 9, before and after the checkpoint that it goes on from
]
STAGED = [
    *("train.mode=staged", "train.denoiser_steps=6", "train.bank_steps=3"),
    *("schedule.logsnr_min=auto", "kl_weight.kind=auto", "kl_weight.search=0.2"),
    *("kl_weight.target=0", "kl_weight.gain=0.002"),  # of the controller: as if they had not been set
]
STAGES = (0, 1, 2, 3)
MODES = ("frozen", "finetune")
# Free bits are granted to one micro-batch of all ranks at a time, so accumulation changes what they do.
ACCUMULATED = ["engine.gradient_accumulation=2", "objective.free_bits=0"]
VARIANTS = (
    {f"zero{stage}": [f"engine.zero_stage={stage}"] for stage in STAGES}
    | {f"accumulated{stage}": [f"engine.zero_stage={stage}", *ACCUMULATED] for stage in STAGES}
    | {f"encoder{stage}": ["engine.zero_stage=3", f"engine.encoder_zero_stage={stage}"] for stage in (0, 1, 3)}
    | {"encoder3_accumulated": ["engine.zero_stage=3", "engine.encoder_zero_stage=3", *ACCUMULATED]}
    | {"offload2": ["engine.zero_stage=2", "engine.offload=optimizer"], "offload3": ["engine.zero_stage=3", "engine.offload=parameters"]}
    | {"captured2": ["engine.zero_stage=2", "objective.free_bits=0"]}
    | {f"recomputed{stage}": [f"engine.zero_stage={stage}", "engine.checkpoint_activations=true"] for stage in (2, 3)}
)


FEW = 32  # images that the axes are turned by: the validation's batches are small here, and a turn takes 17 passes over each


def all_live(information: np.ndarray) -> np.ndarray:
    """In place of `turning.live_dims`: so few steps leave hardly a latent alive, and without two there is nothing to turn."""
    return np.arange(len(information))


def settings(folder: str, name: str, *overrides: str) -> Config:
    return load_config(str(HERE / "tiny.yaml"), [*COMMON, f"runs_dir={folder}", f"name={name}", *overrides])


def train_until(config: Config, step: int, end: Callable[[], None]) -> None:
    """Train, and do something right after the checkpoint of that step."""
    trainer = Trainer(config, resume=False, overwrite=False)
    save = trainer.engine.save

    def save_and_end(folder, done, state, facts):
        save(folder, done, state, facts)
        if done == step:
            end()

    trainer.engine.save = save_and_end
    trainer.run()


def interrupt() -> None:
    raise InterruptedError


def kill_last_rank() -> None:
    if torch.distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def main(folder: str, part: str = "") -> None:
    # Memory that nobody has written yet holds NaN instead of, mostly, harmless numbers. DeepSpeed pads the last rank's parts with it.
    torch.use_deterministic_algorithms(True, warn_only=True)
    turning.live_dims, turning.IMAGES = all_live, FEW
    if part:
        stage = part[-1]
        config = settings(folder, f"zero{stage}", f"engine.zero_stage={stage}")
        if part.startswith("kill"):
            train_until(config, 8, kill_last_rank)
        else:
            train(config, resume=True)
        return
    for name, overrides in VARIANTS.items():
        Captured.wait = 0 if name == "captured2" else WAIT
        train(settings(folder, name, *overrides))
    Captured.wait = WAIT
    for mode in MODES:
        for stage in (0, 3):
            overrides = [f"train.mode={mode}", f"denoiser.pretrained={folder}/zero0", f"engine.zero_stage={stage}"]
            train(settings(folder, f"{mode}{stage}", *overrides))
    for stage in STAGES:  # in folders of their own: a denoiser is used again by runs of any ZeRO stage
        train(settings(f"{folder}/staged{stage}", "tiny", *STAGED, f"engine.zero_stage={stage}"))
    for stage in STAGES:
        config = settings(folder, f"resumed{stage}", f"engine.zero_stage={stage}")
        try:
            train_until(config, 8, interrupt)
        except InterruptedError:
            if torch.distributed.get_rank() == 0:
                shutil.copytree(config.run_dir, Path(folder) / f"stopped{stage}")
            train(config, resume=True)
        train(settings(folder, f"from_one{stage}", f"engine.zero_stage={stage}"), resume=True)
    measure_parts(folder)
    fill_disk(folder)
    poison(folder)


def measure_parts(folder: str) -> None:
    """Bytes of the denoiser's weights that this rank holds at ZeRO-3, and what they would be in one piece."""
    trainer = Trainer(settings(folder, "parts", "engine.zero_stage=3"), resume=False, overwrite=False)
    parameters = [p for name, p in trainer.engine.parameters.items() if name.startswith("denoiser.")]
    held = {
        "partitioned": sum(is_partitioned(p) and p.numel() == 0 for p in parameters),
        "bytes": sum(4 * max(local(p).numel(), p.numel()) for p in parameters),
        "whole": sum(4 * p.ds_numel for p in parameters),
    }
    Path(folder, f"parts_{torch.distributed.get_rank()}.json").write_text(json.dumps(held))


def fill_disk(folder: str) -> None:
    """Only the first rank writes; the other must learn of its failure."""
    full = Trainer(settings(folder, "full"), resume=False, overwrite=False)
    write, base.save_file = base.save_file, no_space
    try:
        full.run()
    except UserError as error:
        Path(folder, f"full_{torch.distributed.get_rank()}.txt").write_text(str(error))
    base.save_file = write


def no_space(*arguments, **options):
    raise OSError("No space left")


def poison(folder: str) -> None:
    """One rank alone sees bad numbers; all must stop."""
    poisoned = Trainer(settings(folder, "poisoned"), resume=False, overwrite=False)
    rank = torch.distributed.get_rank()
    if rank == 1:
        with torch.no_grad():
            poisoned.model.denoiser.stem.weight.fill_(float("nan"))
    try:
        poisoned.run()
    except NonFiniteError as error:
        Path(folder, f"stopped_{rank}.txt").write_text(str(error))


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
