"""Trains the tiny run on every rank of a real launcher, once per variant: `deepspeed --num_accelerators 2 ranks_worker.py FOLDER`."""

import sys
from pathlib import Path

import torch

from sami_fast import train as training
from sami_fast.config import load_config
from sami_fast.errors import NonFiniteError, UserError

HERE = Path(__file__).resolve().parent
# Free bits and the controller both use the KL of the whole batch: they would show a rank that looks at its own part only.
COMMON = [
    "train.batch_size=16",
    "objective.noise_levels=2",
    "objective.free_bits=0.02",
    "kl_weight.kind=controller",
    "kl_weight.target=1",
    "kl_weight.gain=0.1",
]
VARIANTS = {f"zero{stage}": [f"engine.zero_stage={stage}"] for stage in (0, 1, 2)} | {
    # free bits are granted to one micro-batch of all ranks at a time
    "accumulated": ["engine.zero_stage=1", "engine.gradient_accumulation=2", "objective.free_bits=0"]
}


def main(folder: str) -> None:
    for name, overrides in VARIANTS.items():
        config = load_config(str(HERE / "tiny.yaml"), [*COMMON, f"runs_dir={folder}", f"name={name}", *overrides])
        training.train(config)
        if name == "zero2":  # and a run that stops in the middle and goes on
            half = load_config(str(HERE / "tiny.yaml"), [*COMMON, f"runs_dir={folder}", "name=resumed", *overrides])
            trainer = training.Trainer(half, resume=False, overwrite=False)
            trainer.engine.save, stop = _save_then_stop(trainer.engine.save, at=8), InterruptedError
            try:
                trainer.run()
            except stop:
                training.train(half, resume=True)
    full = training.Trainer(
        load_config(str(HERE / "tiny.yaml"), [*COMMON, f"runs_dir={folder}", "name=full"]), resume=False, overwrite=False
    )
    if torch.distributed.get_rank() == 0:  # only this rank writes at ZeRO 0; the other must not wait for it for ever
        full.engine.deepspeed.checkpoint_engine.save = _no_space
    try:
        full.run()
    except UserError as error:
        Path(folder, f"full_{torch.distributed.get_rank()}.txt").write_text(str(error))
    poisoned = training.Trainer(
        load_config(str(HERE / "tiny.yaml"), [*COMMON, f"runs_dir={folder}", "name=poisoned"]), resume=False, overwrite=False
    )
    rank = torch.distributed.get_rank()
    if rank == 1:  # one rank alone sees bad numbers; all must stop
        with torch.no_grad():
            poisoned.model.denoiser.stem.weight.fill_(float("nan"))
    try:
        poisoned.run()
    except NonFiniteError as error:
        Path(folder, f"stopped_{rank}.txt").write_text(str(error))


def _no_space(*arguments, **options):
    raise OSError("No space left")


def _save_then_stop(save, at):
    def wrapped(folder, step, state, facts):
        saved = save(folder, step, state, facts)
        if step == at:
            raise InterruptedError
        return saved

    return wrapped


if __name__ == "__main__":
    main(sys.argv[-1])
