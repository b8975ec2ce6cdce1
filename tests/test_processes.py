"""Ranks that wait for one another: not in a collective, which would end the run after its timeout."""

import argparse
import multiprocessing
import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from sami_fast.cli.files import open_model
from sami_fast.config import load_config
from sami_fast.engine import processes
from sami_fast.engine.processes import init_distributed, leave_distributed, on_chief, on_each
from sami_fast.errors import UserError
from sami_fast.train import _opened

TIMEOUT = 2.0  # seconds, of collectives


def _rank(rank: int, port: int, folder: Path) -> None:
    """Writes what it saw."""
    processes.collective_timeout = lambda: timedelta(seconds=TIMEOUT)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    init_distributed(patience=60)
    begin, seen = time.monotonic(), []

    def slowly() -> int:
        time.sleep(2 * TIMEOUT)
        return 7

    def badly() -> None:
        raise UserError("no such folder") if rank == 1 else OSError("no disk")

    on_chief(slowly)
    seen.append(time.monotonic() - begin > 2 * TIMEOUT)
    seen.append(on_each(lambda: slowly() if rank else 3))
    for act in (on_chief, on_each):
        try:
            act(badly)
        except UserError as error:
            seen.append(str(error))
    torch.distributed.barrier()
    (folder / str(rank)).write_text(repr(seen))
    leave_distributed()


@pytest.mark.timeout(120)
def test_others_wait_longer_than_a_collective_may(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [multiprocessing.get_context("spawn").Process(target=_rank, args=(rank, port, tmp_path)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(100)
        assert child.exitcode == 0
    assert (tmp_path / "0").read_text() == repr([True, 3, "no disk", "no disk"])
    assert (tmp_path / "1").read_text() == repr([True, 7, "no disk", "no such folder"])


def test_how_a_gpu_computes():
    """As the settings say in training; in full float32 and the same way every time where a model is used, whatever was set before."""

    def flags() -> tuple[bool, ...]:
        cudnn = torch.backends.cudnn
        return torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, not cudnn.deterministic, cudnn.benchmark

    before = flags()
    try:
        for overrides, expected in (([], False), (["engine.tf32=true", "engine.deterministic=false"], True)):
            try:
                _opened(load_config("disks", overrides))
            finally:
                leave_distributed()
            assert flags() == (expected,) * 4
        open_model(argparse.Namespace(run=str(Path(__file__).with_name("disks_model")), device="cpu", trust=False))
        assert not any(flags())
    finally:
        tf32, torch.backends.cudnn.allow_tf32, hasty, torch.backends.cudnn.benchmark = before
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.deterministic = tf32, not hasty
