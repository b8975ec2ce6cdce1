"""The table of tuned tiles: who takes what from it, what is no table, and that no tile changes a value."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers import normal, relative_error
from sami_fast.kernels import attention, gaussian_log_prob, noise_sample, tiles
from sami_fast.kernels._common import recording

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TUNED = {"BLOCK_Z": 64, "num_warps": 2}
TABLE = {"sm_90": {"gaussian_log_prob": {"fwd short": TUNED}}}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Makes launchers read another table."""

    def use(content: object) -> Path:
        file = tmp_path / "tiles.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setenv("SAMI_FAST_TILES", str(file))
        forget()
        return file

    def forget() -> None:
        tiles._table.cache_clear()
        tiles._selected.cache_clear()

    yield use
    forget()


def recorded(arch: int) -> list:
    z = torch.ones(3, 8, device="meta")
    with recording(arch=arch) as launches:
        gaussian_log_prob.gaussian_log_prob_fwd(z, z, z)
        gaussian_log_prob.gaussian_log_prob_bwd(z[:, 0], z, z, z)
    return [(item.constants["BLOCK_Z"], item.num_warps) for item in launches]


def test_what_comes_with_the_package_is_a_table():
    tiles.read(tiles.BUILT_IN)


def test_a_chip_takes_its_own_tiles_and_all_else_the_defaults(table):
    table(TABLE)
    assert recorded(90) == [(64, 2), (128, 1)]
    assert recorded(80) == recorded(0) == [(128, 1), (128, 1)]


def test_ahead_of_time_each_chip_gets_what_it_would_select(table):
    """In a process of its own: this one interprets its kernels."""
    code = """
from sami_fast.kernels.aot import sources
for arch in (80, 90):
    print(*sorted({s.tiles for s in sources("gaussian_log_prob", arch) if s.kernel == "_gaussian_log_prob_fwd_kernel"}), sep=", ")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["SAMI_FAST_TILES"] = str(table(TABLE))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["Z1024 w4 s2, Z128 w1 s2", "Z1024 w4 s2, Z64 w2 s2"], done.stderr


def test_the_file_is_read_once(table):
    file = table(TABLE)
    assert recorded(90)[0] == (64, 2)
    file.unlink()
    assert recorded(90)[0] == (64, 2)
    assert recorded(100)[0] == (128, 1)


@pytest.mark.parametrize("op", tiles.OPS)
def test_every_key_is_asked_for(op):
    """By the cases that are compiled ahead of time; a key that nobody asks for could be tuned in vain."""
    asked = set()
    for _, call in import_module(f"sami_fast.kernels.{op}").aot_cases():
        with recording(), tiles.noting(asked.add):
            call()
    # Interpreted attention has the tiles of 16 bits whatever comes, for speed.
    assert asked == {(op, key) for key in tiles.declared(op) if not (op == "attention" and tiles.INTERPRETED and "32-bit" in key)}


# Values


@pytest.mark.skipif(DEVICE == "cpu" and not tiles.INTERPRETED, reason="kernels run on a GPU or interpreted")
@pytest.mark.parametrize("block", [32, 512])
def test_noise_does_not_depend_on_tiles(block):
    x_0, levels = normal(2, 3, 5, 5, dtype=torch.float32).to(DEVICE), torch.ones(2, 3, device=DEVICE)
    arguments = x_0, levels, levels, torch.arange(2, device=DEVICE), 3, 4, 0, True
    expected = noise_sample.noise_sample_fwd(*arguments)
    with tiles.trying("noise_sample", "32-bit any", {"BLOCK_Q": block, "num_warps": 2}):
        found = noise_sample.noise_sample_fwd(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(DEVICE == "cpu" and not tiles.INTERPRETED, reason="kernels run on a GPU or interpreted")
def test_other_tiles_give_the_same_attention():
    q, k, v = (normal(1, 40, 2, 8, seed=seed, dtype=torch.float32).to(DEVICE) for seed in range(3))
    expected = attention.attention_fwd(q, k, v, 0.3, False)
    key = f"fwd {16 if tiles.INTERPRETED else 32}-bit D=16"
    with tiles.trying("attention", key, {"BLOCK_Q": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}):
        found = attention.attention_fwd(q, k, v, 0.3, False)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(found, expected, strict=True))


# Errors


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[1", "tile table .*tiles.json: Expecting"),
        ([1], r"tile table .*tiles.json: expected an object, found \[1\]"),
        ({"H100": {}}, "H100: expected a chip such as sm_90"),
        ({"sm_90": {"attentoin": {}}}, "sm_90, attentoin: expected one of attention, "),
        ({"sm_90": {"attention": 3}}, "sm_90, attention: expected an object, found 3"),
        (
            {"sm_90": {"attention": {"fwd": {}}}},
            "sm_90, attention, fwd: no such key; the keys are those of SCHEDULES",
        ),
        (
            {"sm_90": {"gaussian_log_prob": {"fwd short": {"BLOCK_Z": 64}}}},
            "sm_90, gaussian_log_prob, fwd short: expected BLOCK_Z, num_warps, found BLOCK_Z",
        ),
        (
            {"sm_90": {"gaussian_log_prob": {"fwd short": TUNED | {"BLOCK_Z": 96}}}},
            "sm_90, gaussian_log_prob, fwd short, BLOCK_Z: expected a power of two from 1 to 65536, found 96",
        ),
        ({"sm_90": {"gaussian_log_prob": {"fwd short": TUNED | {"num_warps": True}}}}, "num_warps: expected .*, found True"),
    ],
)
def test_what_is_no_table_is_an_error_that_names_the_place(table, content, reason):
    table(content)
    with pytest.raises(ValueError, match=reason):
        recorded(90)


def test_a_missing_file_is_an_error(table):
    table(TABLE).unlink()
    with pytest.raises(ValueError, match=r"tile table .*tiles.json: .*No such file"):
        recorded(90)


def test_a_candidate_is_checked_too():
    with (
        pytest.raises(ValueError, match="fwd short: expected BLOCK_Z, num_warps, found BLOCK"),
        tiles.trying("gaussian_log_prob", "fwd short", {"BLOCK": 1}),
    ):
        pass
