"""Networks by name: the import of a class, the settings that name it, and what a saved model may and may not import."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import TINY, assert_same_weights, rows, tiny, weights
from their_networks import Encoder

from sami_fast import cli
from sami_fast.adapters import EncoderAdapter
from sami_fast.config import load_config, to_yaml
from sami_fast.errors import UserError
from sami_fast.evaluation import open_run
from sami_fast.methods.build import build_model
from sami_fast.methods.registry import load_model
from sami_fast.methods.sami import Sami
from sami_fast.named import load_named
from sami_fast.plan import plan
from sami_fast.pretrained import image_shape_of
from sami_fast.report import write_report
from sami_fast.train import main, train

THEIRS = Path(__file__).resolve().with_name("their_networks.py")
BOTH = [
    *(f"encoder.class={THEIRS}:Encoder", "encoder.returns=mu_logvar", "encoder.kwargs.width=4"),
    *(f"denoiser.class={THEIRS}:SteppedDenoiser", "denoiser.time=timestep"),
]


# ---- the import


def test_a_module_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "someones").mkdir()
    (tmp_path / "someones" / "__init__.py").touch()
    (tmp_path / "someones" / "nets.py").write_text("from .parts import Part\nclass Net:\n    class Inner(Part): pass\n")
    (tmp_path / "someones" / "parts.py").write_text("class Part: pass\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert load_named("someones.nets:Net.Inner", "encoder.class").__name__ == "Inner"
    assert sys.path == before
    assert load_named("torch.nn:Conv2d", "encoder.class") is torch.nn.Conv2d


def test_a_file(tmp_path, monkeypatch):
    """It runs once, under a name of its own, and finds what lies beside it; modules that are installed come first."""
    (tmp_path / "json.py").write_text("raise RuntimeError\n")
    (tmp_path / "beside_it.py").write_text("WIDTH = 3\n")
    file = tmp_path / "a file.py"
    file.write_text(
        "import json\nfrom dataclasses import dataclass\nimport beside_it\n@dataclass\nclass Net:\n    width: int = beside_it.WIDTH\n"
    )
    before = list(sys.path)
    made = load_named(f"{file}:Net", "encoder.class")
    assert made().width == 3
    monkeypatch.chdir(tmp_path)
    assert load_named("./a file.py:Net", "denoiser.class") is made
    assert sys.path == before


@pytest.mark.parametrize(
    ("text", "spec", "words"),
    [
        ("", "nets.py:Net", "data.class: .*nets.py has no Net"),
        (
            "import absent_package\n",
            "nets.py:Net",
            "importing .*nets.py fails at .*nets.py, line 1: ModuleNotFoundError: No module named 'absent",
        ),
        ("\n\nclass Net(\n", "nets.py:Net", r"data.class: .*nets.py, line 3: SyntaxError: "),
        ("x = 1\n\ny = x / 0\n", "nets.py:Net", "nets.py, line 3: ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit(3)\n", "nets.py:Net", "nets.py, line 2: SystemExit: 3"),
        ("", "absent.py:Net", "data.class: no file .*absent.py"),
        ("", "absent_package.nets:Net", "data.class: no module absent_package, neither installed nor in "),
        ("", "json.absent:Net", "data.class: no module json.absent"),
        ("", "json.decoder:Net", "data.class: json.decoder has no Net"),
        ("", "nets.py", "data.class: expected package.module:Name or path/to/file.py:Name, found '.*nets.py'"),
        ("", "json:a b", "data.class: expected package.module:Name or path/to/file.py:Name"),
    ],
)
def test_what_cannot_be_imported(text, spec, words, tmp_path):
    (tmp_path / "nets.py").write_text(text)
    spec = f"{tmp_path}/{spec}" if ".py" in spec else spec
    before = list(sys.path)
    with pytest.raises(UserError, match=words):
        load_named(spec, "data.class")
    assert sys.path == before


def test_a_file_that_failed_is_run_anew(tmp_path):
    file = tmp_path / "mended.py"
    file.write_text("1 / 0\n")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        load_named(f"{file}:Net", "encoder.class")
    file.write_text("class Net: pass\n")
    assert load_named(f"{file}:Net", "encoder.class").__name__ == "Net"


# ---- the settings


def test_arguments_of_a_class_have_the_types_that_they_look_like(tmp_path):
    text = (
        "encoder:\n  class: someones.nets:Encoder\n"
        "  kwargs: {a: 1, b: -2.5, c: 1e-3, d: true, e: null, f: text, g: '1', h: \"true\", i: [1, [x, '2']], j: {k: 0, l: auto}, m: 010}\n"
    )
    (tmp_path / "run.yaml").write_text(text)
    expected = {"a": 1, "b": -2.5, "c": 1e-3, "d": True, "e": None, "f": "text", "g": "1", "h": "true", "i": [1, ["x", "2"]]}
    expected |= {"j": {"k": 0, "l": "auto"}, "m": "010"}
    config = load_config(str(tmp_path / "run.yaml"))
    assert config.encoder.kwargs == expected
    assert [type(v) for v in config.encoder.kwargs.values()] == [type(v) for v in expected.values()]
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    again = load_config(str(tmp_path / "again.yaml"), ["encoder.kwargs.a=64", "encoder.kwargs={n: [3], j: 5}"])
    assert again.encoder.kwargs == expected | {"a": 64, "n": [3], "j": 5}
    assert again.encoder.class_ == "someones.nets:Encoder"


def test_a_file_means_the_same_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(None, ["encoder.class=nets.py:Net"]).encoder.class_ == f"{tmp_path}/nets.py:Net"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["encoder.class=nets"], "encoder.class: expected package.module:Name or path/to/file.py:Name, found 'nets'"),
        (["encoder.kwargs=3"], "encoder.kwargs: expected arguments by name, such as encoder.kwargs.width=64, found '3'"),
        (["encoder.class=a:B", "encoder.kwargs.b.c=3"], "encoder.kwargs: expected names of arguments, found 'b.c'"),
        (
            ["encoder.class=a:B", "encoder.kwargs.b=1", "encoder.channels=[8]"],
            "encoder.channels: has no effect here, it needs an empty encoder.c",
        ),
        (["encoder.class=a:B", "encoder.init_std=0.5"], "encoder.init_std: has no effect here, it needs an empty encoder.class"),
        (["denoiser.class=a:B", "denoiser.blocks=2"], "denoiser.blocks: has no effect here, it needs an empty denoiser.class"),
        (["encoder.kwargs.width=3"], "encoder.kwargs: has no effect here, it needs encoder.class"),
        (["encoder.returns=mu_std"], "encoder.returns: has no effect here, it needs encoder.class"),
        (["denoiser.time=sigma"], "denoiser.time: has no effect here, it needs denoiser.class"),
        (
            ["denoiser.class=a:B", "denoiser.pretrained=runs/a", "train.mode=frozen", "denoiser.kwargs.width=3"],
            "denoiser.kwargs: has no effect here, it needs an empty denoiser.pretrained",
        ),
        (["denoiser.class=a:B", "denoiser.timesteps=10"], "denoiser.timesteps: has no effect here, it needs denoiser.time timestep"),
        (["encoder.class=a:B", "method=beta_vae"], "encoder.class: expected method sami, found beta_vae"),
        (["denoiser.class=a:B", "method=diffae"], "denoiser.class: expected method sami, found diffae"),
        (["encoder.class=a:B", "engine.score=sweeps"], "engine.score: expected auto or reverse with encoder.class, found sweeps"),
        (["encoder.class=a:B", "engine.compile=step"], "engine.compile: step needs .* no encoder.class"),
        (
            ["encoder.class=a:B", "engine.zero_stage=3", "engine.encoder_zero_stage=3"],
            "engine.encoder_zero_stage: 3 needs .*no encoder.class",
        ),
        (["denoiser.class=a:B", "engine.checkpoint_activations=true"], "engine.checkpoint_activations: expected false with denoiser.class"),
        (["denoiser.class=a:B", "train.mode=staged", "encoder.start=denoiser"], "encoder.start: expected fresh with denoiser.class"),
        (["denoiser.class=a:B", "schedule.kind=discrete"], "schedule.kind: discrete needs denoiser.pretrained, or a denoiser.class with"),
        (["denoiser.class=a:B", "denoiser.predicts=epsilon"], "denoiser.predicts: expected one of eps, v, x_0, found 'epsilon'"),
    ],
)
def test_settings_that_cannot_be(overrides, words):
    with pytest.raises(UserError, match=words):
        load_config(None, overrides)


def test_a_mistake_leaves_no_run_folder(tmp_path, capsys):
    arguments = ["--config", TINY, f"runs_dir={tmp_path}", f"encoder.class={THEIRS}:Encoder"]
    assert main(arguments) == 2
    assert "sami-fast: encoder.returns: " in capsys.readouterr().err
    assert main([*arguments, "train.mode=staged"]) == 2
    assert "sami-fast: encoder.returns: " in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.name != "cache"]


# ---- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tiny(tmp_path_factory.mktemp("runs"), *BOTH))


def test_nothing_is_imported_without_permission(run, tmp_path, monkeypatch, capsys):
    touched = tmp_path / "touched"
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(touched)!r}, 'w')\n")
    saved = json.loads((run / "model/config.json").read_text())
    for network in ("encoder", "denoiser"):
        saved[network]["class"] = f"{evil}:Net"
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(saved))
    (tmp_path / "model/model.safetensors").write_bytes((run / "model/model.safetensors").read_bytes())
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text().replace(f"{THEIRS}", f"{evil}"))
    for name in ("environment.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    words = (
        f"its encoder is the class {evil}:Net and its denoiser is the class {evil}:Net, code that would be imported; if you trust it, add"
    )
    for load in (load_model, Sami.from_pretrained, open_run, write_report):
        with pytest.raises(UserError, match=words):
            load(tmp_path)
    out = str(tmp_path / "out.npz")
    for command in (
        ["encode", str(tmp_path), "--output", out],
        ["traverse", str(tmp_path), "--output", out],
        ["axes", str(tmp_path), "--output", out],
        ["report", str(tmp_path)],
        ["evaluate", str(tmp_path)],
    ):
        assert cli.main(command) == 2
        assert words in capsys.readouterr().err
    for method in ("beta_vae", "diffae"):  # whose networks are never classes by name
        (tmp_path / "model/config.json").write_text(json.dumps(saved | {"method": method, "decoder": saved["denoiser"]}))
        with pytest.raises(UserError):
            load_model(tmp_path, trust_remote_code=True)
    (tmp_path / "model/config.json").write_text(
        json.dumps(saved | {"encoder": {"half_of": saved["denoiser"], "latent_size": 4, "init_std": 1}})
    )
    with pytest.raises(UserError, match="its denoiser is the class"):
        load_model(tmp_path)
    with pytest.raises(
        UserError, match=rf"denoiser.pretrained: .* is the class {evil}:Net; if you trust it, set denoiser.class to the same"
    ):
        train(tiny(tmp_path / "runs", "train.mode=frozen", f"denoiser.pretrained={tmp_path}"))
    assert not touched.exists()


def test_what_is_saved_is_what_is_loaded(run):
    with pytest.raises(UserError, match="trust_remote_code=True"):
        load_model(run)
    model = load_model(run, trust_remote_code=True)
    assert isinstance(model.encoder, EncoderAdapter)
    assert model.encoder.network.first.weight.shape == (4, 1, 3, 3)
    assert {"encoder.network.offset", "denoiser.network.table.weight"} <= weights(run).keys()  # a buffer of chance, too
    for name, value in weights(run).items():
        assert torch.equal(model.state_dict()[name], value), name
    assert image_shape_of(run) == model.image_shape == (1, 8, 8)
    assert model.latent_size == 4
    config = load_config(str(run / "config.yaml"))
    assert config.encoder.kwargs == {"width": 4}
    assert (config.denoiser.class_, config.denoiser.time) == (f"{THEIRS}:SteppedDenoiser", "timestep")


def test_what_a_network_holds_beside_weights_is_saved_and_loaded(tmp_path):
    run = train(tiny(tmp_path, f"encoder.class={THEIRS}:HoldingEncoder", "encoder.returns=mu_logvar"))
    model = load_model(run, trust_remote_code=True)
    assert torch.equal(model.encoder.network.mask, torch.full((3, 4), -torch.inf).triu(1).T)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_model(tmp_path / "saved", trust_remote_code=True).encoder.network.mask, model.encoder.network.mask)


@pytest.mark.parametrize(
    "overrides",
    [
        [f"encoder.class={THEIRS}:TimedEncoder", "encoder.returns=mu_logvar", "encoder.takes=x_t"],
        [f"denoiser.class={THEIRS}:Denoiser", "denoiser.time=edm", "denoiser.predicts=x_0", "train.mode=staged", "train.denoiser_steps=4"],
        [*BOTH, "train.mode=staged", "train.denoiser_steps=4", "train.bank_steps=3"],
        [*BOTH, "schedule.kind=discrete", "objective.noise_levels=2"],
        [*BOTH, "engine.zero_stage=1"],
        [*BOTH, "engine.zero_stage=3", "engine.encoder_zero_stage=2"],
        [*BOTH, "engine.precision=bf16", "engine.gradient_accumulation=2"],
        [f"encoder.class={THEIRS}:IdleEncoder", "encoder.returns=mu_logvar", "schedule.logsnr_min=auto"],
    ],
)
def test_a_run_is_trained_saved_and_resumed_bit_for_bit(overrides, tmp_path):
    whole = train(tiny(tmp_path, *overrides))
    assert len(rows(whole)) == 12
    again = train(tiny(tmp_path / "again", *overrides))
    for stale in ("checkpoints/step_12", "model"):
        for file in sorted((again / stale).glob("*")):
            file.unlink()
        (again / stale).rmdir()
    train(tiny(tmp_path / "again", *overrides), resume=True)
    assert_same_weights(again, whole)
    fresh = build_model(tiny(tmp_path, *overrides), (1, 8, 8)).state_dict()
    for network in ("encoder", "denoiser"):
        assert any(not torch.equal(value, fresh[name]) for name, value in weights(whole).items() if name.startswith(network))


def test_a_resumed_run_has_the_same_class_and_arguments(run, tmp_path):
    for other, words in ((["encoder.kwargs.width=5"], "encoder.kwargs.width"), (["denoiser.predicts=v"], "denoiser.predicts")):
        with pytest.raises(UserError, match=words):
            train(tiny(run.parent, *BOTH, *other), resume=True)


def test_beside_a_trained_denoiser_of_a_class(run, tmp_path):
    """Its class has to be named, its arguments are its own; its encoder's class is not imported."""
    named = [f"denoiser.class={THEIRS}:SteppedDenoiser", f"denoiser.pretrained={run}"]
    frozen = train(tiny(tmp_path, *named, "train.mode=frozen", "name=frozen", "schedule.logsnr_min=-6"))
    for name, value in weights(run).items():
        if name.startswith("denoiser."):
            assert torch.equal(weights(frozen)[name], value)
    tuned = train(tiny(tmp_path, *named, *BOTH[:3], "train.mode=finetune", "name=tuned"))
    assert not torch.equal(weights(tuned)["denoiser.network.first.weight"], weights(run)["denoiser.network.first.weight"])
    with pytest.raises(UserError, match=r"denoiser of .* is the class .*SteppedDenoiser; if you trust it, set denoiser.class to the same"):
        train(tiny(tmp_path, f"denoiser.pretrained={run}", "train.mode=frozen", "name=other"))
    with pytest.raises(UserError, match=r"denoiser of .* is the class .*SteppedDenoiser; if you trust it"):
        train(tiny(tmp_path, f"denoiser.class={THEIRS}:Denoiser", f"denoiser.pretrained={run}", "train.mode=frozen", "name=other"))


def test_a_plan_counts_them(tmp_path):
    found = plan(tiny(tmp_path, *BOTH), [1, 2])
    assert found.method == "reverse"
    assert found.networks["encoder"].parameters == sum(p.numel() for p in Encoder((1, 8, 8), 4, 4).parameters())
    assert found.networks["encoder"].forward > 0
    assert found.networks["denoiser"].forward > 0


def test_a_plan_of_what_looks_at_its_numbers(tmp_path):
    """Counted on tensors with data, the same."""
    counted = [
        plan(tiny(tmp_path, f"encoder.class={THEIRS}:{name}", "encoder.returns=mu_logvar"), [1]) for name in ("Encoder", "LookingEncoder")
    ]
    assert counted[0].flops == counted[1].flops


def test_commands_work_on_it_with_permission(run, tmp_path, capsys):
    run = Path(shutil.copytree(run, tmp_path / "run"))
    model = load_model(run, trust_remote_code=True)
    with torch.no_grad():  # as if it had learned something
        model.encoder.network.heads.weight.mul_(20)
        model.encoder.network.heads.bias[4:] = -6
    model.save_pretrained(run / "model")
    assert cli.main(["report", str(run), "--trust"]) == 0
    assert json.loads((run / "report/metrics.json").read_text())["num_images"] == 64
    for command in (
        ["encode", "codes.npz"],
        ["sample", "new.png", "--count", "2", "--steps", "2"],
        ["reconstruct", "again.png", "--count", "2", "--steps", "2"],
        ["traverse", "along.png", "--steps", "2", "--axis", "0"],
        ["axes", "axes.npz", "--images", "16", "--draws", "2"],
    ):
        name, output, *options = command
        assert cli.main([name, str(run), "--trust", "--output", str(tmp_path / output), *options]) == 0, capsys.readouterr().err
        assert (tmp_path / output).exists()
    assert cli.main(["evaluate", str(run), "--trust", "--images", "64", "--output", str(tmp_path / "table.json")]) == 0
    (row,) = json.loads((tmp_path / "table.json").read_text())
    assert row["config"]["encoder"]["class"] == f"{THEIRS}:Encoder"
