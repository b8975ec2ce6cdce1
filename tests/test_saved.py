"""Saved models that a stranger made, or a kill: one sentence, at once, or the whole model."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from helpers import normal
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sami_fast.cli import main
from sami_fast.errors import UserError
from sami_fast.methods.registry import load_model
from sami_fast.methods.sami import Sami
from sami_fast.pretrained import load_diffusers
from sami_fast.saved import read_weights
from sami_fast.schedule import UniformLogsnr

IMAGE = {"image_channels": 1, "image_size": 8}
ENCODER = IMAGE | {"latent_size": 3, "channels": [4, 6], "attention": [4]}
DENOISER = IMAGE | {"channels": [4, 6], "embedding_size": 8, "skip_logsnr": -5.0}
SCHEDULE = {"kind": "uniform_logsnr", "logsnr_min": -7.0, "logsnr_max": 5.0}


def build(seed: int = 0, **changes) -> Sami:
    torch.manual_seed(seed)
    return Sami.build({"encoder": ENCODER | changes, "denoiser": DENOISER}, SCHEDULE)


@pytest.fixture
def saved(tmp_path) -> Path:
    build().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def unet(tmp_path) -> Path:
    """A diffusers UNet with its scheduler in one folder."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8), "layers_per_block": 1}
    diffusers.UNet2DModel(**sizes, **blocks, norm_num_groups=4, attention_head_dim=4).save_pretrained(tmp_path / "unet")
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


def rewrite(file: Path, change) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(file)
    save_file({name: value.contiguous() for name, value in change(tensors).items()}, file)


def load_unet(folder: Path) -> nn.Module:
    return load_diffusers(folder, UniformLogsnr(-7.0, 5.0))


DOORS = {
    "from_pretrained": ("saved", Sami.from_pretrained, "model.safetensors"),
    "load_model": ("saved", load_model, "model.safetensors"),
    "diffusers": ("unet", load_unet, "diffusion_pytorch_model.safetensors"),
}

HARM = {
    "nothing": (lambda t: {}, "weights of another architecture"),
    "one missing": (lambda t: {name: t[name] for name in sorted(t)[1:]}, "it lacks "),
    "one more": (lambda t: t | {"more": torch.zeros(3)}, "has unexpected more"),
    "a prefix of some": (lambda t: {f"net.{name}": value for name, value in t.items()}, "lacks"),
    "NaN": (lambda t: {name: torch.full_like(value, float("nan")) for name, value in t.items()}, "holds NaN or infinity"),
    "infinity": (lambda t: {name: value / 0 for name, value in t.items()}, "holds NaN or infinity"),
    "too large": (lambda t: {name: value.double() + 1e300 for name, value in t.items()}, "numbers too large for torch.float32"),
    "whole numbers": (lambda t: {name: value.to(torch.int8) for name, value in t.items()}, "in torch.float32, found torch.int8"),
    "truth values": (lambda t: {name: value > 0 for name, value in t.items()}, "in torch.float32, found torch.bool"),
    "eight bits": (lambda t: {name: value.to(torch.float8_e4m3fn) for name, value in t.items()}, "found torch.float8_e4m3fn"),
    "complex": (lambda t: {name: value.to(torch.complex64) for name, value in t.items()}, "found torch.complex64"),
    "flat": (lambda t: {name: value.flatten() for name, value in t.items()}, "of shape ["),
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("door", DOORS)
def test_weights_are_complete_floating_and_finite(door, harm, request):
    fixture, load, name = DOORS[door]
    folder = request.getfixturevalue(fixture)
    change, fragment = HARM[harm]
    rewrite(folder / name, change)
    with pytest.raises(UserError) as caught:
        load(folder)
    assert str(folder / name) in str(caught.value)
    assert fragment in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("prefix", ["", "module.", "module.module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("door", DOORS)
def test_other_precisions_and_wrapped_networks_load(door, prefix, dtype, request):
    fixture, load, name = DOORS[door]
    folder = request.getfixturevalue(fixture)
    expected = load(folder).state_dict()
    rewrite(folder / name, lambda tensors: {prefix + key: value.to(dtype) for key, value in tensors.items()})
    found = load(folder).state_dict()
    for key, value in expected.items():
        assert torch.equal(found[key], value.to(dtype).float()), key


def test_a_prefix_of_some_keys_is_a_mistake(saved):
    rewrite(saved / "model.safetensors", lambda t: {f"module.{n}" if "mu" in n else n: v for n, v in t.items()})
    with pytest.raises(UserError, match=r"it lacks encoder\.mu\.bias, encoder\.mu\.weight"):
        load_model(saved)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("networks", [("encoder",), ("encoder", "denoiser")])
def test_networks_that_were_wrapped_by_themselves_load(networks, wrapper, saved):
    """`model.encoder = torch.compile(model.encoder)`, then `model.state_dict()`."""
    expected = load_model(saved).state_dict()

    def wrapped(name: str) -> str:
        network, _, rest = name.partition(".")
        return f"{network}.{wrapper}{rest}" if network in networks else name

    rewrite(saved / "model.safetensors", lambda tensors: {wrapped(name): value for name, value in tensors.items()})
    found = load_model(saved).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_compiled_network_is_saved_and_loaded(tmp_path):
    model = build()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    model.encoder = torch.compile(model.encoder)
    model.save_pretrained(tmp_path)
    found = load_model(tmp_path).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_attention_by_its_names_of_before(unet):
    """As in checkpoints of before 2023, which diffusers renames."""
    expected = load_unet(unet).state_dict()
    config = json.loads((unet / "config.json").read_text())
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old(name: str) -> str:
        return next((name.replace(new, before) for new, before in names.items() if new in name), name)

    rewrite(unet / "diffusion_pytorch_model.safetensors", lambda t: {old(name): value for name, value in t.items()})
    (unet / "config.json").write_text(json.dumps(config))
    found = load_unet(unet).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_command_says_what_is_wrong_with_weights(saved, tmp_path, capsys):
    rewrite(saved / "model.safetensors", lambda t: {n: torch.full_like(v, float("nan")) for n, v in t.items()})
    assert main(["sample", str(saved), "--steps", "2", "--output", str(tmp_path / "x.png")]) == 2
    assert "holds NaN or infinity" in capsys.readouterr().err


def test_keys_and_shapes_are_those_of_a_network_on_no_device(tmp_path):
    save_file({"weight": normal(2, 3), "bias": normal(2)}, tmp_path / "linear.safetensors")
    with torch.device("meta"):
        expected = nn.Linear(3, 2).state_dict()
    found = read_weights(tmp_path / "linear.safetensors", expected)
    assert torch.equal(found["weight"], normal(2, 3).float())


@pytest.mark.parametrize("harm", [None, torch.inf, torch.nan, -torch.inf])
def test_infinity_is_read_where_the_network_has_it(harm, tmp_path):
    network = nn.Linear(3, 3)
    network.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
    stored = {name: value.clone() for name, value in network.state_dict().items()}
    if harm is not None:
        stored["mask"][(0, 0) if harm == -torch.inf else (0, 1)] = harm
    save_file(stored, tmp_path / "net.safetensors")
    if harm is None:
        assert torch.equal(read_weights(tmp_path / "net.safetensors", network.state_dict())["mask"], network.mask)
        network.to("meta")  # which says nothing of its numbers
    with pytest.raises(UserError, match="mask holds NaN or infinity"):
        read_weights(tmp_path / "net.safetensors", network.state_dict())


# Weights in several files, and variants


def same(found: nn.Module, expected: nn.Module) -> bool:
    ours = expected.state_dict()
    return all(torch.equal(value, ours[name]) for name, value in found.state_dict().items())


def test_weights_in_parts_are_the_same_model(tmp_path):
    pytest.importorskip("huggingface_hub")
    build().save_pretrained(tmp_path, max_shard_size="1KB")
    parts = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(parts) > 2
    assert set(index["weight_map"].values()) == {part.name for part in parts}
    assert index["metadata"]["total_size"] == sum(4 * value.numel() for value in build().parameters())
    assert same(load_model(tmp_path), build())
    from huggingface_hub import load_torch_model  # as others read them

    other = build(1)
    load_torch_model(other, tmp_path)
    assert same(other, build())


def test_one_file_and_parts_replace_each_other(tmp_path):
    pytest.importorskip("huggingface_hub")
    one = {"config.json", "model.safetensors"}
    for seed, size, latents in ((0, None, 3), (1, "1KB", 5), (2, "2KB", 3), (3, None, 5)):
        build(seed, latent_size=latents).save_pretrained(tmp_path, max_shard_size=size)
        assert same(load_model(tmp_path), build(seed, latent_size=latents))
        names = {file.name for file in tmp_path.iterdir()}
        assert names == one if size is None else "model.safetensors" not in names
    build(4).save_pretrained(tmp_path, max_shard_size="1GB")  # all of it fits into one
    assert {file.name for file in tmp_path.iterdir()} == one


def test_variants_lie_beside_each_other(tmp_path):
    build(0).save_pretrained(tmp_path)
    build(1).half().save_pretrained(tmp_path, variant="fp16")
    assert load_file(tmp_path / "model.fp16.safetensors")["encoder.mu.weight"].dtype == torch.float16
    assert same(load_model(tmp_path), build(0))
    found = load_model(tmp_path, variant="fp16")
    assert same(found, build(1).half().float())
    assert found.encoder.mu.weight.dtype == torch.float32
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors there; of its variants there is fp16"):
        load_model(tmp_path)
    with pytest.raises(UserError, match=r"no model\.bf16\.safetensors there; of its variants there is fp16"):
        load_model(tmp_path, variant="bf16")
    for variant in ("../fp16", "", "a b"):
        if variant:
            with pytest.raises(UserError, match="variant: expected a word such as fp16"):
                load_model(tmp_path, variant=variant)
    with pytest.raises(UserError, match="variant: expected a word"):
        build().save_pretrained(tmp_path / "new", variant="a/b")
    assert not (tmp_path / "new").exists()


def test_folders_inside(tmp_path):
    build().save_pretrained(tmp_path / "all/disks")
    assert same(load_model(tmp_path / "all", subfolder="disks"), build())
    for subfolder in ("../all", "/etc", "disks/../.."):
        with pytest.raises(UserError, match="subfolder: expected a folder inside the model's"):
            load_model(tmp_path / "all", subfolder=subfolder)


def test_a_unet_in_parts_and_of_a_variant(unet):
    expected = load_unet(unet)
    unet_model = expected.network
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    unet_model.save_pretrained(unet, max_shard_size="4KB")
    unet_model.save_pretrained(unet, variant="fp16")
    assert len(list(unet.glob("diffusion_pytorch_model-*-of-*.safetensors"))) > 1
    assert same(load_unet(unet), expected)
    assert same(load_diffusers(unet, UniformLogsnr(-7.0, 5.0), variant="fp16"), expected)
    with pytest.raises(UserError, match=r"no diffusion_pytorch_model\.bf16\.safetensors there"):
        load_diffusers(unet, UniformLogsnr(-7.0, 5.0), variant="bf16")


INDEX = "model.safetensors.index.json"


def first(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def change_map(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def renamed(name):
    return lambda folder: change_map(folder, lambda places: places | {min(places): name})


DAMAGE = {
    "a part is missing": (
        lambda folder: first(folder).unlink(),
        r"index\.json: model-00001-of-\d+\.safetensors is not there, one of \d+ files",
    ),
    "a part is cut short": (
        lambda folder: os.truncate(first(folder), 100),
        r"model-00001-of-\d+\.safetensors: damaged or not a safetensors",
    ),
    "a part is a folder": (lambda folder: (first(folder).unlink(), (folder / "model-00001-of-00000.safetensors").mkdir()), "is not there"),
    "a part of another save": (
        lambda folder: (
            (first(folder).rename(folder / "kept"), build(1).save_pretrained(folder, max_shard_size="1KB"))
            and (folder / "kept").rename(first(folder))
        ),
        "files of weights from two saves, the later of which was cut short; save the model again",
    ),
    "a tensor in two parts": (
        lambda folder: save_file(load_file(first(folder)), max(folder.glob("model-*.safetensors")), {"save": _mark(folder)}),
        "in two files of weights, expected in one",
    ),
    "a file outside": (renamed("../model.safetensors"), r"expected names of safetensors files beside it, found '\.\./model\.safetensors'"),
    "a file of the system": (renamed("/etc/passwd"), "expected names of safetensors files beside it, found '/etc/passwd'"),
    "a pickle": (renamed("pytorch_model.bin"), "expected names of safetensors files beside it"),
    "an option": (renamed("..safetensors"), "expected names of safetensors files"),
    "no name": (renamed(7), "expected a weight_map from tensors to files"),
    "no map": (lambda folder: change_map(folder, lambda places: []), "expected a weight_map from tensors to files"),
    "an empty map": (lambda folder: change_map(folder, lambda places: {}), "expected a weight_map from tensors to files"),
    "a long map": (
        lambda folder: change_map(folder, lambda places: {str(n): f"{n}.safetensors" for n in range(1001)}),
        "at most 1000 files",
    ),
    "no JSON": (lambda folder: (folder / INDEX).write_text("{"), r"index\.json: not valid JSON"),
    "notes of another kind": (lambda folder: (folder / INDEX).write_text('{"metadata": [1]}'), "expected a weight_map"),
}


def _mark(folder: Path) -> str:
    with safe_open(first(folder), "pt") as stored:
        return stored.metadata()["save"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_parts_are_said_in_a_sentence(damage, tmp_path):
    pytest.importorskip("huggingface_hub")
    build().save_pretrained(tmp_path, max_shard_size="1KB")
    harm, message = DAMAGE[damage]
    harm(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", ["many", -1, [1]])
def test_a_size_that_is_none(size, tmp_path):
    pytest.importorskip("huggingface_hub")
    with pytest.raises(UserError, match="max_shard_size: expected bytes or words such as 5GB, found"):
        build().save_pretrained(tmp_path / "model", max_shard_size=size)
    assert not (tmp_path / "model").exists()


DEEP: list = []
for _ in range(200):
    DEEP = [DEEP]

SETTINGS = {
    "method of a list": ({"method": ["sami"]}, "expected a model of method sami"),
    "method of a dict": ({"method": {}}, "expected a model of method sami"),
    "no encoder": ({"encoder": None}, "does not describe a model"),
    "init_std": ({"encoder": {"init_std": 1e30}}, "init_std: expected a number above 0 and at most 100, found 1e+30"),
    "no init_std": ({"encoder": {"init_std": "wide"}}, "init_std"),
    "blocks": ({"denoiser": {"blocks": 10**12}}, "blocks: expected a whole number from 0 to 64, found 1000000000000"),
    "half a block": ({"encoder": {"blocks": 0.5}}, "blocks: expected a whole number"),
    "levels": ({"denoiser": {"channels": [4] * 10**5}}, "channels: expected a list of 1 to 16 widths"),
    "width": ({"encoder": {"channels": [4, 10**12]}}, "channels: expected a whole number from 1 to 65536"),
    "width of a file of terabytes": ({"denoiser": {"channels": [65536] * 4}}, "weights of another architecture: expected "),
    "latents of terabytes": ({"encoder": {"latent_size": 65536, "channels": [65536, 65536]}}, "weights of another architecture: expected "),
    "words for widths": ({"encoder": {"channels": "44"}}, "channels: expected a list"),
    "image": ({"denoiser": {"image_size": 2**60}}, "image_size: expected a whole number"),
    "groups": ({"encoder": {"groups": 0}}, "groups: expected a whole number from 1"),
    "style": ({"encoder": {"style": ["relu"]}}, "style: expected one of"),
    "attention": ({"encoder": {"attention": [[4]]}}, "does not describe a model"),
    "unknown setting": ({"encoder": {"colour": 1}}, "colour"),
    "deep": ({"encoder": {"channels": DEEP}}, "nested deeper than 32 levels"),
    "schedule": ({"schedule": []}, "does not describe a model"),
    "schedule of a list": ({"schedule": {"kind": ["cosine"]}}, "does not describe a model"),
    "schedule of words": ({"schedule": {"logsnr_min": "low"}}, "does not describe a model"),
    "schedule without end": ({"schedule": {"logsnr_min": -float("inf")}}, "logsnr: expected at most 100"),
    "schedule of NaN": ({"schedule": {"logsnr_max": float("nan")}}, "logsnr_min: expected less than"),
    "method's settings": ({"settings": [1]}, "does not describe a model"),
    "method's unknown setting": ({"settings": {"encoder": 1}}, "does not describe a model"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_are_checked_before_a_network_is_made(case, saved):
    changes, fragment = SETTINGS[case]
    settings = json.loads((saved / "config.json").read_text())
    for name, value in changes.items():
        settings[name] = settings[name] | value if isinstance(value, dict) and isinstance(settings[name], dict) and value else value
    (saved / "config.json").write_text(json.dumps(settings))
    start = time.process_time()
    with pytest.raises(UserError) as caught:
        load_model(saved)
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.process_time() - start < 5  # what is built first takes minutes


@pytest.mark.parametrize("text", ["", "null", "[]", "{", "[" * 100_000, '{"format": 1e999}', "1" * 10_000, "\xff"])
def test_settings_that_are_none(text, saved):
    (saved / "config.json").write_text(text, encoding="latin1")
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(saved)
    with pytest.raises(UserError):
        load_unet(saved)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layers_per_block", 10**9),
        ("layers_per_block", "many"),
        ("block_out_channels", [8, 10**9]),
        ("block_out_channels", [131072, 131072]),
        ("block_out_channels", {}),
        ("norm_num_groups", 0),
        ("attention_head_dim", 0),
        ("down_block_types", ["os.system", "DownBlock2D"]),
        ("sample_size", [[8], [8]]),
        ("in_channels", 2**40),
        ("time_embedding_type", 7),
    ],
)
def test_settings_of_a_unet_are_checked_before_it_is_made(name, value, unet):
    settings = json.loads((unet / "config.json").read_text())
    (unet / "config.json").write_text(json.dumps(settings | {name: value}))
    start = time.process_time()
    with pytest.raises(UserError) as caught:
        load_unet(unet)
    assert "\n" not in str(caught.value)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(("name", "value"), [("num_train_timesteps", 10**12), ("trained_betas", ["x"]), ("beta_start", float("nan"))])
def test_settings_of_a_scheduler_are_checked(name, value, unet):
    file = unet / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(UserError, match="cannot be used as a denoiser"):
        load_unet(unet)


@pytest.mark.parametrize("name", ["runs/disks", "mine/disks", "./disks", "~/disks", "../disks", "a/b/c", "disks"])
def test_what_looks_like_a_path_is_no_model_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"no config\.json there; expected a run folder or a saved model"):
        load_model(name)
    with pytest.raises(UserError, match=r"no config\.json there"):
        load_model(Path("somebody/model"))


def test_a_kill_between_the_two_files_leaves_a_whole_model(tmp_path):
    """At every system call that puts a file in its place: another architecture over an old one gives the old model or the new."""
    code = """
        import os, signal, sys
        sys.path.insert(0, sys.argv[1])
        from test_saved import build
        place, left = os.replace, int(sys.argv[3])
        def replace(*paths):
            global left
            left -= 1
            if left == 0: os.kill(os.getpid(), signal.SIGKILL)
            place(*paths)
        os.replace = replace
        build(seed=1, latent_size=5).save_pretrained(sys.argv[2])
    """
    folder, found = tmp_path / "model", []
    for call in (1, 2, 3):
        build().save_pretrained(folder)
        arguments = [sys.executable, "-c", textwrap.dedent(code), str(Path(__file__).parent), str(folder), str(call)]
        status = subprocess.run(arguments, check=False).returncode
        assert status == (0 if call == 3 else -signal.SIGKILL)
        model = load_model(folder)
        expected = build() if model.latent_size == 3 else build(seed=1, latent_size=5)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())
        found.append(model.latent_size)
    assert found == [3, 5, 5]
    build().save_pretrained(folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]  # what the kills left is gone
    assert load_model(folder).latent_size == 3
