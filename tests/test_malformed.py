"""Configs and arguments that cannot work, several hundred of them drawn by fixed seeds: exit status 2, one sentence, nothing written.

Each is wrong for certain. What is wrong perhaps, files with random damage, has to give a config or a `UserError`.
"""

import argparse
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from sami_fast import cli
from sami_fast.config import Config, builtin_configs, load_config, setting_keys
from sami_fast.errors import UserError
from sami_fast.train import main as train

ROOT = Path(__file__).resolve().parents[1]

Case = tuple[Callable[[Sequence[str]], int], list[str]]  # a command and its arguments
NOT_YAML = [
    *("[", "]", "{", "'", '"5', "[1", "{a: 1", "*none", "!!int 5", "!!python/object:os.system x"),
    *("[" * 3000, "&a [*a]", "a: b: c", "\x01"),
]
NOT = {
    int: [
        *(*NOT_YAML, "abc", "1.5", "010", "12:30", "", "null", "~", "[1]", "{a: 1}"),
        *("1e3", "0x", "5 5", "½", "-5", "${seed}", "9" * 5000, "#"),
    ],
    float: [*NOT_YAML, "abc", "1:30", "", "null", "[1]", "1,5", "0x10", "nan", ".inf", "1e999", "${seed}"],
    bool: [*NOT_YAML, "maybe", "2", "1.0", "", "null", "[true]", "tru"],
    list: [*NOT_YAML, "5", "", "64,64", "{a: 1}", "[[1]]", "[{a: 1}]", "[1,[2]]", "null"],
}
BROKEN = [
    *("\n}", "\nseed: 1\nseed: 2", "\nnonsense: 1", "\nseed: !!int 5", "\n<<: 5", "\n? [a]\n: 5", "\nseed: [", "\n\tseed: 5", "\nseed: *a"),
    *(
        "\nseed: 5\n seed",
        "\ntrain.steps: 5\ntrain.steps: 6",
        "\noptimizer: &a [*a]",
        '\nname: "\\0"',
        "\nname: [a, b]",
        "\nlog: yes",
        "\n---\nseed: 5",
    ),
    *(
        "\nruns_dir: {a: 1}",
        "\ndata.disks.x: [0, 1, 2]",
        "\nname: ''",
        "\ndata:",
        "\n'data': {kind: nothing}",
        "\nseed: " + "[" * 3000,
        "\n\x00",
    ),
]


def mistyped(dice: random.Random) -> Case:
    key, item = dice.choice([(key, item) for key, item in setting_keys().items() if item.type is not str])
    kind = item.type if item.type in NOT else list if hasattr(item.type, "__origin__") else float
    wrong = dice.choice(NOT[kind])
    return train, ["--config", dice.choice(["disks", "sprites"]), f"{key}={wrong}"]


def out_of_choices(dice: random.Random) -> Case:
    key = dice.choice([key for key, item in setting_keys().items() if item.type is str and item.metadata["check"][0].startswith("one of")])
    return train, [f"{key}={dice.choice(['', 'nothing', '[', 'Disks', 'null', '1', '~', 'a' * 3000])}"]


def unknown(dice: random.Random) -> Case:
    key, keys = dice.choice([*setting_keys()]), setting_keys()
    while key in keys or any(known.startswith(f"{key}.") for known in keys):
        place = dice.randrange(len(key) + 1)
        key = key[:place] + dice.choice([*"abz._-[{:\n\té=", ""]) + key[place + dice.randrange(2) :]
        key = key.partition("=")[0]
    return train, [f"{key}={dice.choice(['1', 'a', '[1]', '{', ''])}"]


def no_setting(dice: random.Random) -> Case:
    return train, [
        dice.choice(["train.steps", "=", "=5", "train", "train=5", "train=[1]", "data=null", "data.disks=x", ".=1", "~", "a b", "{}"])
    ]


def broken_file(dice: random.Random) -> Case:
    text = (builtin_configs() / f"{dice.choice(['disks', 'near_sprites'])}.yaml").read_text() + dice.choice(BROKEN)
    Path("run.yaml").write_bytes(text.encode() + dice.choice([b"", b"\n"]))
    return train, ["--config", "run.yaml"]


def no_text(dice: random.Random) -> Case:
    Path("run.yaml").write_bytes(bytes(dice.choice([0xFF, 0xFE, 0x00, 0x80, 0xC3]) for _ in range(dice.randrange(1, 9))))
    return train, ["--config", "run.yaml"]


def no_file(dice: random.Random) -> Case:
    Path("folder.yaml").mkdir()
    wrong = dice.choice(["diskz", "folder.yaml", "~no_such_user/a.yaml", "", "a/b/disks.yaml", "disks.yml", "\n", "é" * 30])
    return (train, ["--config", wrong]) if dice.random() < 0.5 else (cli.main, ["plan", wrong])


def together(dice: random.Random) -> Case:
    return train, dice.choice(
        [
            ["--resume", "--overwrite"],
            ["data.kind=array", "data.path=none.npy", "data.channels=99"],
            ["data.kind=image_folder", "data.path=none", f"data.channels={dice.choice([2, 4, 64])}"],
            ["data.path=photos"],
            ["data.holdout=0.2"],
            ["data.video.stride=2"],
            ["data.kind=sprites", "data.disks.edge_slope=2"],
            ["--config", "photos_small", "data.path=photos", "train.steps=50"],
            ["method=beta_vae", "objective.free_bits=0.1"],
            ["kl_weight.target=3"],
            ["train.bank_steps=5"],
            ["schedule.logsnr_min=6"],
            ["train.mode=frozen"],
            ["denoiser.pretrained=~no_such_user/model"],
            ["runs_dir=~no_such_user/runs"],
        ]
    )


def options(dice: random.Random) -> Case:
    return train, dice.choice(
        [["--nope"], ["--config"], ["--dry-run=5"], ["--local_rank", "x"], ["-x"], ["--config", "disks", "--over=1"], ["--resume=yes"]]
    )


def subcommands() -> dict[str, argparse.ArgumentParser]:
    actions = cli.parser()._actions
    return next(dict(action.choices) for action in actions if isinstance(action, argparse._SubParsersAction))


def command(dice: random.Random) -> Case:
    """One wrong value, or an option too many, of one command."""
    name, parser = dice.choice([*subcommands().items()])
    given = [action for action in parser._actions if action.option_strings and (action.choices or action.type) and action.dest not in FILES]
    arguments = [name, *(["disks"] if name in ("plan", "data") else ["nowhere"] if name != "env" else [])]
    if not given or dice.random() < 0.3:
        return cli.main, [*arguments, dice.choice(["--nope", "--json=5", "--config", "-z"])]
    wrong = dice.choice(["x", "", "-1e9", "nan", "½", "1e400", "9" * 30, "inf", "[1]"])
    return cli.main, [*arguments, dice.choice(given).option_strings[-1], wrong]


FILES = ("output", "data", "axes")


def missing(dice: random.Random) -> Case:
    run = dice.choice(["nowhere", "", "~no_such_user/run", "a\nb", "x" * 3000])
    name = dice.choice(["encode", "sample", "reconstruct", "traverse", "report", "evaluate", "axes"])
    ending = dice.choice([".npz", ".png", ".txt", ""])
    return cli.main, [name, run, *([] if name in ("report", "evaluate") else ["--output", f"out{ending}"])]


def overridden(dice: random.Random) -> Case:
    """The commands that take settings, with options between them."""
    _, (*_, wrong) = mistyped(dice)
    return cli.main, [dice.choice(["plan", "data"]), "disks", "--json", wrong]


KINDS = (mistyped, mistyped, mistyped, out_of_choices, unknown, unknown, no_setting, broken_file, broken_file, no_text, no_file, together)
KINDS += (options, command, command, missing, overridden)
COUNT = 20 * len(KINDS)


def refused(run: Callable[[Sequence[str]], int], arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2, and one sentence on one line; wrong usage may say what is usual before it."""
    try:
        status, usage = run(arguments), False
    except SystemExit as stop:
        status, usage = stop.code, True
    printed = capsys.readouterr()
    lines = printed.err.rstrip("\n").split("\n")
    assert status == 2, (arguments, status)
    assert "Traceback" not in printed.err
    assert printed.out == ""
    if usage:
        assert lines[0].startswith("usage: sami"), printed.err
        assert ": error: " in lines[-1], printed.err
    else:
        assert len(lines) == 1, printed.err
        assert lines[0].startswith("sami-fast: "), printed.err
        assert len(lines[0]) < 6500, printed.err  # of which a name, as it was given, may be most


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", range(COUNT))
def test_what_cannot_work_gets_one_sentence(seed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, arguments = KINDS[seed % len(KINDS)](random.Random(seed))
    before = sorted(tmp_path.iterdir())
    refused(run, arguments, capsys)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", range(8))
def test_random_damage_gives_a_config_or_one_sentence(seed, tmp_path):
    dice, file = random.Random(seed), tmp_path / "run.yaml"
    texts = [path.read_text() for path in sorted(builtin_configs().glob("*.yaml"))]
    for _ in range(60):
        text = dice.choice(texts)
        for _ in range(dice.randrange(1, 6)):
            place = dice.randrange(len(text) + 1)
            new = dice.choice(
                [*"\n\t :[]{}&*!|>'\"#%@`,?-0aé", "", "<<: ", "&a ", "*a", "!!", "---\n", "auto", "null", text[place : place + 40]]
            )
            text = text[:place] + new + text[place + dice.choice([0, 1, 1, 5, 60]) :]
        file.write_text(text)
        with suppress(UserError):
            assert isinstance(load_config(str(file)), Config)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (["sami_fast/train.py"], ["--config", "disks", "encoder.channels=" + "[" * 3000]),
        (["-m", "sami_fast.cli"], ["data", "disks", "--json", "name=a/b", "--seconds", "0"]),
    ],
)
def test_the_same_as_a_command(command, arguments, tmp_path):
    first = [str(ROOT / command[0])] if command[0].endswith(".py") else command
    done = subprocess.run(
        [sys.executable, *first, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("sami-fast: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
