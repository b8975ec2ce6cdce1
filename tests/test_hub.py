"""Models from and to the Hugging Face hub, by the real huggingface_hub. There is no network here: the hub itself is tests/hub_server.py."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import TOKEN, Hub, commit_of
from test_saved import build, load_unet, unet  # noqa: F401 (a fixture)
from torch import Tensor

from sami_fast import UserError, hub, load_model
from sami_fast.config import load_config
from sami_fast.methods.baselines import BetaVAE
from sami_fast.methods.build import build_model
from sami_fast.methods.sami import Sami
from sami_fast.pretrained import load_diffusers
from sami_fast.schedule import UniformLogsnr

THEIRS = Path(__file__).resolve().with_name("their_networks.py")
constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def server(monkeypatch, tmp_path):
    """An empty hub, and nobody logged in."""
    found = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", found.url)  # both are $HF_ENDPOINT, at the time of the library's import
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    hub._fetched.cache_clear()
    yield found
    found.stop()
    hub._fetched.cache_clear()


def put(server: Hub, repo: str, folder: Path, at: str = "", revision: str = "main") -> None:
    """The files of a folder in a repository."""
    files = server.repos.setdefault(repo, {"main": {}}).setdefault(revision, {})
    files |= {at + file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    ours: dict[str, Tensor] = expected.state_dict()
    assert found.state_dict().keys() == ours.keys()
    for name, value in found.state_dict().items():
        assert torch.equal(value, ours[name]), name


def test_what_is_pushed_is_loaded(server):
    model = build()
    address = model.push_to_hub("me/disks", token=TOKEN)
    files = server.repos["me/disks"]["main"]
    assert address == f"{server.url}/me/disks/commit/{commit_of(files)}"
    assert files.keys() == {"config.json", "model.safetensors", "README.md"}
    assert 'model = load_model("me/disks")\n' in files["README.md"].decode()
    for load in (load_model, Sami.from_pretrained):
        assert_same(load("me/disks"), model)
    with pytest.raises(UserError, match="me/disks: expected a model of method beta_vae, found sami"):
        BetaVAE.from_pretrained("me/disks")


def test_branches_and_commits(server):
    one, other = build(0), build(1)
    one.push_to_hub("disks", token=TOKEN)
    before = commit_of(server.repos["me/disks"]["main"])
    other.push_to_hub("me/disks", token=TOKEN, revision="dev")
    assert_same(load_model("me/disks"), one)
    assert_same(load_model("me/disks", revision="dev"), other)
    assert_same(load_model("me/disks", revision=before), one)
    with pytest.raises(UserError, match=r"me/disks: neither a folder here nor a model the hub would give \(.+\)"):
        load_model("me/disks", revision="no-such-branch")


def test_a_private_model_needs_a_token(server):
    build().push_to_hub("me/secret", token=TOKEN, private=True)
    for token in (None, False, "hf_of_another"):
        with pytest.raises(UserError, match="me/secret: neither a folder here nor a model the hub would give"):
            load_model("me/secret", token=token)
    assert_same(load_model("me/secret", token=TOKEN), build())
    with pytest.raises(UserError, match=r"me/other: the hub would not take the model \(.+\)"):
        build().push_to_hub("me/other")
    assert "me/other" not in server.repos
    with pytest.raises(UserError, match="the hub would not take the model"):
        build().push_to_hub("a name with spaces", token=TOKEN)


def test_files_of_before_are_enough(server, tmp_path):
    build().push_to_hub("me/disks", token=TOKEN)
    with pytest.raises(UserError, match="neither a folder here nor a model"):
        load_model("me/disks", cache_dir=tmp_path / "mine", local_files_only=True)
    load_model("me/disks", cache_dir=tmp_path / "mine")
    assert (tmp_path / "mine" / "models--me--disks").is_dir()
    asked = len(server.asked)
    assert_same(load_model("me/disks", cache_dir=tmp_path / "mine", local_files_only=True), build())
    assert len(server.asked) == asked
    assert not (tmp_path / "cache").exists()


def test_only_what_is_needed_is_fetched(server, tmp_path):
    """Of a folder inside, of one variant; nothing pickled, and none of the rest."""
    build(0).save_pretrained(tmp_path / "full")
    build(1).half().save_pretrained(tmp_path / "half", variant="fp16", max_shard_size=1000)
    for kind in ("full", "half"):
        put(server, "me/disks", tmp_path / kind, "models/disks/")
    server.repos["me/disks"]["main"] |= {"models/disks/pytorch_model.bin": b"pickle", "models/disks/other.safetensors": b"", "big.npz": b""}
    assert_same(load_model("me/disks", subfolder="models/disks"), build(0))
    fetched = {path.rpartition("/")[2] for path in server.asked if "GET /me/disks/resolve" in path}
    assert fetched == {"config.json", "model.safetensors"}
    server.asked.clear()
    found = load_model("me/disks", subfolder="models/disks/", variant="fp16")
    assert_same(found, build(1).half().float())
    fetched = {path.rpartition("/")[2] for path in server.asked if "GET /me/disks/resolve" in path}
    assert "model.safetensors.index.fp16.json" in fetched
    assert not fetched & {"model.safetensors", "pytorch_model.bin", "other.safetensors"}
    with pytest.raises(UserError, match=r"me/disks: no config\.json there"):
        load_model("me/disks")
    with pytest.raises(UserError, match=r"no model\.bf16\.safetensors there"):
        load_model("me/disks", subfolder="models/disks", variant="bf16")


def test_a_model_in_parts_makes_room_for_one_in_a_file(server):
    build(0).push_to_hub("me/disks", token=TOKEN, max_shard_size="1KB")
    parts = [name for name in server.repos["me/disks"]["main"] if "-of-" in name]
    assert len(parts) > 2
    assert_same(load_model("me/disks"), build(0))
    build(2).half().push_to_hub("me/disks", token=TOKEN, variant="fp16")
    build(1).push_to_hub("me/disks", token=TOKEN)
    names = server.repos["me/disks"]["main"].keys()
    assert names == {"config.json", "README.md", "model.safetensors", "model.fp16.safetensors"}
    assert_same(load_model("me/disks"), build(1))
    assert_same(load_model("me/disks", variant="fp16"), build(2).half().float())


def test_a_unet_of_diffusers(server, unet):  # noqa: F811 (a fixture)
    put(server, "google/ddpm", unet)
    put(server, "google/ddpm", unet, "small/")
    schedule = UniformLogsnr(-7.0, 5.0)
    for options in ({}, {"subfolder": "small"}, {"revision": "main", "token": False}):
        assert_same(load_diffusers("google/ddpm", schedule, **options), load_unet(unet))


def test_the_hub_is_away(server, monkeypatch):
    server.stop()
    monkeypatch.setattr(server, "stop", lambda: None)
    for call in (lambda: load_model("me/disks"), lambda: build().push_to_hub("me/disks", token=TOKEN)):
        with pytest.raises(UserError, match=r"me/disks: .*the hub would") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_without_the_library(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    hub._fetched.cache_clear()
    with pytest.raises(UserError, match="somebody/model: no such folder; loading a hub id needs `pip install huggingface_hub`"):
        load_model("somebody/model")
    with pytest.raises(UserError, match=r"push_to_hub: needs `pip install 'sami-fast\[hub\]'`"):
        build().push_to_hub("me/disks")
    with pytest.raises(UserError, match="max_shard_size: needs"):
        build().save_pretrained(tmp_path, max_shard_size=1000)
    assert list(tmp_path.iterdir()) == []
    build().save_pretrained(tmp_path)  # needs it for nothing


# The card


def test_a_card_says_how_this_model_is_loaded(server, tmp_path):
    """Of a variant alone, and of classes by name, the plain call would fail."""
    build().half().push_to_hub("me/half", token=TOKEN, variant="fp16")
    config = load_config(None, ["data.channels=1", f"encoder.class={THEIRS}:Encoder", "encoder.returns=mu_logvar"])
    build_model(config, (1, 8, 8)).push_to_hub("me/named", token=TOKEN)
    for repo, options in (("me/half", ', variant="fp16"'), ("me/named", ", trust_remote_code=True")):
        (line,) = (line for line in server.repos[repo]["main"]["README.md"].decode().splitlines() if "model = " in line)
        assert line == f'model = load_model("{repo}"{options})'
        there: dict[str, Sami] = {}
        exec(line, {"load_model": load_model}, there)
        assert there["model"].image_shape == (1, 8, 8)
        with pytest.raises(UserError):
            load_model(repo)
    build().half().save_pretrained(tmp_path / "model", variant="fp16", run=run_of(tmp_path, {}, {}))
    assert 'load_model("this/folder", variant="fp16")' in (tmp_path / "model/README.md").read_text()


def run_of(tmp_path: Path, scores: dict, config: dict) -> Path:
    run = tmp_path / "disks"
    (run / "report").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "report/metrics.json").write_text(json.dumps(scores))
    return run


def test_a_card_tells_of_the_run(tmp_path):
    scores = {
        "mcc": 0.93456,
        "linear_r2": {"x": 0.5, "y": 1.0},
        "kl_per_dim": [1.0, 2.0],
        "elbo_nats": None,
        "untrained": {"mcc": 0.1},
        "pca": {"linear_r2": {"x": 0.25, "y": 0.75}},
        "health": {"word": "healthy", "reason": "2 of 3 latents hold 4.0 nats.", "remedy": ""},
    }
    config = {"data": {"kind": "disks", "path": "/home/me/faces", "image_size": 16}, "runs_dir": "/home/me/runs", "train": {"steps": 50}}
    config["denoiser"] = {"pretrained": "/home/me/ddpm"}
    build().save_pretrained(tmp_path / "model", run=run_of(tmp_path, scores, config))
    card = (tmp_path / "model/README.md").read_text()
    repocard = pytest.importorskip("huggingface_hub.repocard")
    front, text = card.split("---\n")[1:]
    assert yaml.safe_load(front)["library_name"] == "sami-fast"
    assert {"sami-fast", "sami"} <= set(yaml.safe_load(front)["tags"])
    assert repocard.ModelCard(card).data.library_name == "sami-fast"
    assert text.startswith("# disks\n")
    assert "3 latents of images of 1 x 8 x 8" in text
    assert "| Score | This model | Untrained encoder | PCA |\n| --- | --- | --- | --- |\n" in text
    assert "| mcc | 0.9346 | 0.1 |  |\n" in text
    assert "| linear\\_r2, mean | 0.75 |  | 0.5 |\n" in text
    assert "untrained" not in text
    assert "**Health of the run:** healthy: 2 of 3 latents hold 4.0 nats." in text
    assert "/home/me" not in card  # whose files they were is nobody's business
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert settings == {"data": {"kind": "disks", "image_size": 16}, "denoiser": {"pretrained": "ddpm"}, "train": {"steps": 50}}


def test_a_card_runs_nothing_that_a_name_says(tmp_path):
    """Factors, settings and reasons may hold whatever somebody wrote into a file of labels."""
    evil = "a|b](http://evil) <script>alert(1)</script> `x` **y**\n# heading"
    scores = {evil: 1.0, "health": {"word": evil, "reason": evil}}
    run = run_of(tmp_path, scores, {"data": {"note": "```\n# out of the block\n````\n"}})
    build().save_pretrained(tmp_path / "model", run=run)
    card = (tmp_path / "model/README.md").read_text()
    text, _, config = card.partition("## Config")
    assert "<script>" not in text
    assert "](" not in text
    assert "\n# heading" not in text
    fence = config.strip().splitlines()[0].removesuffix("yaml")
    assert len(fence) == 5
    assert config.strip().splitlines()[-1] == fence
    (row,) = (line for line in text.splitlines() if line.endswith("| 1 |"))
    assert row.replace("\\|", "").count("|") == 3


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: (run / "config.yaml").unlink(), "expected a run folder for the model card; no file"),
        (lambda run: (run / "config.yaml").write_text("a: [1"), "config.yaml: cannot be read"),
        (lambda run: (run / "report/metrics.json").write_text("{"), "metrics.json: not valid JSON"),
    ],
)
def test_a_run_that_is_none(break_it, message, tmp_path):
    run = run_of(tmp_path, {}, {})
    break_it(run)
    with pytest.raises(UserError, match=message):
        build().save_pretrained(tmp_path / "model", run=run)
