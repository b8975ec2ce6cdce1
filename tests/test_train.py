"""The whole run: folder, resume, ranks, modes, and what stops it."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers import TINY, assert_same_weights, log_rows, rows, tiny, weights
from ranks_worker import COMMON, FEW, MODES, STAGED, STAGES, VARIANTS, all_live, settings
from safetensors.torch import load_file, save_file

from sami_fast import cli, turning
from sami_fast.config import load_config
from sami_fast.data import open_dataset
from sami_fast.engine import checkpoints
from sami_fast.engine.checkpoints import HASH, WEIGHTS
from sami_fast.engine.deepspeed import build_optimizer
from sami_fast.engine.memory import enough_memory
from sami_fast.engine.run_folder import RunFolder
from sami_fast.errors import CollapsedError, NonFiniteError, UserError
from sami_fast.methods.build import build_model
from sami_fast.methods.sami import Sami
from sami_fast.metrics.latents import information_per_dim, kl_per_dim
from sami_fast.step import Draw
from sami_fast.train import Trainer, main, train

ROOT = Path(__file__).resolve().parents[1]


def newest_whole(folder: Path) -> Path | None:
    return next((c for c in checkpoints.list_checkpoints(folder) if not checkpoints.damage(c)), None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted tiny run."""
    return train(tiny(tmp_path_factory.mktemp("runs")))


def _restate(manifest: Path, change: Callable[[dict], object], *, forge: bool = False) -> None:
    """Change what a manifest says; forged, with the hash that goes with it."""
    stated = json.loads(manifest.read_text())
    change(stated)
    if forge:
        stated[HASH] = checkpoints._hash_of(stated)
    manifest.write_text(json.dumps(stated, indent=1))


# ---- the folder


def test_run_folder_holds_what_the_docs_say(finished):
    assert {p.name for p in finished.iterdir()} == {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "model", ".lock"}
    assert load_config(str(finished / "config.yaml")).train.steps == 12
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0] or environment["packages"]["torch"] == torch.__version__
    log = rows(finished)
    assert [row["step"] for row in log] == list(range(1, 13))
    assert all(np.isfinite(row["loss_nats"]) for row in log)
    made_up = log_rows(load_config(str(finished / "config.yaml")))
    written = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert {frozenset(row) for row in made_up} == {frozenset(row) for row in written}  # the report's tests read such rows
    assert log[3]["kl_nats"] == 0
    assert log[-1]["kl_nats"] == pytest.approx(sum(log[-1]["kl_per_dim"]))
    assert log[-1]["information_sum_nats"] == pytest.approx(sum(log[-1]["information_per_dim"]))
    assert log[-1]["loss_nats"] == pytest.approx(log[-1]["diffusion_nats"] + log[-1]["kl_weight"] * log[-1]["kl_nats"], rel=1e-5)


def test_saved_model_loads_and_is_the_average(finished):
    model = Sami.from_pretrained(finished)
    checkpoint = load_file(finished / "checkpoints/step_12" / WEIGHTS)
    for name, value in model.named_parameters():
        assert torch.equal(value, checkpoint[f"{name}/averaged"])
    posterior = model.encode(torch.zeros(2, 1, 8, 8))
    assert posterior.mu.shape == posterior.var.shape == (2, 4)


def test_retention_keeps_the_last_and_the_best(tmp_path):
    run = train(tiny(tmp_path, "checkpoint.every=1", "checkpoint.keep_last=2"))
    kept = checkpoints.list_checkpoints(run / "checkpoints")
    scores = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "validation_nats" in line]
    best = min((s for s in scores if s["validation_nats"] is not None), key=lambda s: s["validation_nats"])["step"]
    assert {p.name for p in kept} == {f"step_{n}" for n in (12, 11, best)}
    assert all(checkpoints.damage(p) == "" for p in kept)


def test_denoiser_warmup_leaves_the_encoder_alone(tmp_path):
    config = tiny(tmp_path, "train.steps=5")
    trainer = Trainer(config, resume=False, overwrite=False)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.config = trainer.engine.config = load_config(TINY, [f"runs_dir={tmp_path}", "train.steps=6"])
    for trainer.step in range(4):
        trainer.engine.update(trainer.step, lambda micro: trainer._losses(micro, 0.0, "denoiser"))
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(name.startswith("denoiser.") for name in moved)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("method", ["sami", "beta_vae"])
def test_the_information_in_the_log_is_that_of_the_whole_batch(tmp_path, method, micro_batches):
    """The parts of a batch are put together before a variance is taken, so that the number of micro-batches and ranks does not show."""
    config = tiny(tmp_path, f"method={method}", f"engine.gradient_accumulation={micro_batches}")
    trainer = Trainer(config, resume=False, overwrite=False)
    with torch.no_grad():
        trainer.model.encoder.mu.bias += 3.0  # costs, and tells nothing
        seen = torch.cat([trainer.feed.micro_batch(7, micro)[0] for micro in range(micro_batches)])
        mu, var = (head.numpy() for head in trainer.model.encoder(seen))
    trainer.step = 7
    values = trainer.engine.update(7, lambda micro: trainer._losses(micro, 0.1, "both")).read()
    np.testing.assert_allclose(trainer._information(values), information_per_dim(mu, var), rtol=1e-4)
    np.testing.assert_allclose(trainer._parts(values)[2], kl_per_dim(mu, var), rtol=1e-4)
    assert sum(trainer._information(values)) < 1 < sum(trainer._parts(values)[2])
    for phase in ("denoiser",) if method == "sami" else ():  # nothing is encoded yet
        waiting = trainer.module(seen, Draw(0, 7, torch.arange(len(seen)), len(seen)), 0.0, phase)[1].tolist()
        assert trainer._information(waiting) == trainer._parts(waiting)[2] == [0.0] * trainer.model.latent_size


# ---- variants


@pytest.mark.parametrize(
    "overrides",
    [
        ["engine.gradient_accumulation=2"],
        ["engine.zero_stage=1"],
        ["engine.zero_stage=2", "engine.gradient_accumulation=4"],
        ["engine.score=reverse"],
        ["engine.score=dual", "engine.store_eps=false", "engine.zero_stage=2"],
    ],
    ids=" ".join,
)
def test_same_losses_however_the_step_is_computed(overrides, tmp_path, finished):
    run = train(tiny(tmp_path, *overrides))
    losses = [[row["loss_nats"] for row in rows(folder)] for folder in (run, finished)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-5)
    for name, value in weights(finished).items():
        torch.testing.assert_close(weights(run)[name], value, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    "overrides",
    [
        ["engine.precision=bf16"],
        ["optimizer.kind=adamw", "optimizer.weight_decay=0.01", "optimizer.ema_decay=0", "optimizer.clip=0"],
        ["encoder.style=bias_free_relu", "denoiser.style=bias_free_relu", "encoder.attention=[4]", "denoiser.attention=[4]"],
        ["schedule.kind=cosine", "objective.weighting=sigmoid", "objective.time_power=2", "objective.unconditional_weight=0.1"],
        ["schedule.kind=linear_beta", "objective.weighting=min_snr", "kl_weight.kind=linear", "objective.noise_levels=3"],
        ["data.channels=3", "data.image_size=12", "kl_weight.kind=constant", "objective.weighting=simple"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_options_train(overrides, tmp_path):
    log = rows(train(tiny(tmp_path, *overrides)))
    assert log[-1]["step"] == 12
    assert all(np.isfinite(row["loss_nats"]) for row in log)


@pytest.mark.parametrize("genuine", [True, False])
def test_apex_is_told_from_its_namesake(genuine, monkeypatch):
    """A stand-in for both packages: NVIDIA's cannot be built on a machine without CUDA."""

    class FusedAdam(torch.optim.Adam):
        def __init__(self, groups, adam_w_mode, **arguments):
            super().__init__(groups, **arguments)
            self.adam_w_mode = adam_w_mode

    apex = ModuleType("apex")
    monkeypatch.setitem(sys.modules, "apex", apex)
    if genuine:
        apex.__path__, optimizers = [], ModuleType("apex.optimizers")
        optimizers.FusedAdam = FusedAdam
        monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    config = load_config(TINY, ["optimizer.implementation=apex", "optimizer.kind=adamw"])
    sami = build_model(config, (1, 8, 8))
    if genuine:
        optimizer = build_optimizer(sami.networks, config, torch.device("cpu"))
        assert isinstance(optimizer, FusedAdam)
        assert optimizer.adam_w_mode
        assert [group["name"] for group in optimizer.param_groups] == ["encoder", "denoiser"]
    else:
        with pytest.raises(UserError, match="NVIDIA apex is not installed"):
            build_optimizer(sami.networks, config, torch.device("cpu"))


def test_monitors_write(tmp_path):
    run = train(tiny(tmp_path, "log.tensorboard=true", "log.csv=true"))
    assert list(run.glob("tensorboard/events.*"))
    assert list(run.glob("csv/*.csv"))


def test_starts_share_one_file_of_events(tmp_path):
    """However often a run is taken up again: every step once, as in the log."""
    options = ["log.tensorboard=true", "log.csv=true"]
    train(tiny(tmp_path, *options))
    for lost in ("step_12", "step_8"):
        shutil.rmtree(tmp_path / "tiny/checkpoints" / lost)
        run = train(tiny(tmp_path, *options), resume=True)
    (events,) = run.glob("tensorboard/events.*")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = [event for event in EventFileLoader(str(events)).Load() if event.HasField("summary")]
    losses = [(event.step, event.summary.value[0].tensor.float_val[0]) for event in found if event.summary.value[0].tag == "loss_nats"]
    assert losses == [(row["step"], pytest.approx(row["loss_nats"])) for row in rows(run)]
    assert len((run / "csv/loss_nats.csv").read_text().splitlines()) == 13  # a line of headings


def test_frozen_mode_trains_the_encoder_alone(tmp_path, finished):
    run = train(tiny(tmp_path, "train.mode=frozen", f"denoiser.pretrained={finished}", "seed=1", "optimizer.ema_decay=0"))
    given, after = weights(finished), weights(run)
    fresh = build_model(tiny(tmp_path, "seed=1"), (1, 8, 8)).state_dict()
    for name, value in after.items():
        if name.startswith("denoiser."):
            assert torch.equal(value, given[name]), name
    assert any(not torch.equal(after[name], fresh[name]) for name in after if name.startswith("encoder."))
    assert rows(run)[0]["kl_nats"] > 0


def test_a_run_of_before_a_setting_was_there_goes_on(tmp_path):
    """Its checkpoints do not name the setting: it had what is now the default, and nothing else."""
    run = train(tiny(tmp_path, "train.steps=8"))
    expected = weights(run)
    manifest = run / "checkpoints/step_4/manifest.json"
    shutil.rmtree(run / "checkpoints/step_8")

    def of_before(stated):
        del stated["settings"]["train"]["minutes"], stated["settings"]["data"]["rooms"], stated["settings"]["kl_weight"]["search"]
        del stated[HASH]
        stated["format"] = 2

    _restate(manifest, of_before)
    with pytest.raises(UserError, match=r"kl_weight\.search \(0\.08 there, 0\.5 here\)"):
        train(tiny(tmp_path, "train.steps=8", "kl_weight.kind=auto", "kl_weight.search=0.5"), resume=True)
    again = weights(train(tiny(tmp_path, "train.steps=8"), resume=True))
    assert all(torch.equal(value, again[name]) for name, value in expected.items())


def test_collapse_is_said_once(tmp_path, capsys):
    # A KL this dear presses every dimension onto the prior at once.
    train(tiny(tmp_path, *DEAR))
    assert capsys.readouterr().out.count("the posterior has collapsed") == 1


DEAR = ["train.steps=60", "kl_weight.kind=constant", "kl_weight.start=1e6", "optimizer.encoder_lr=0.02"]


def test_a_run_may_stop_when_it_collapses(tmp_path, capsys):
    assert main(["--config", TINY, f"runs_dir={tmp_path}", *DEAR, "train.on_collapse=stop"]) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("sami-fast: step ")
    assert "the posterior has collapsed" in last
    assert "kl_weight.kind=auto" in last  # what to do
    assert rows(tmp_path / "tiny")[-1]["step"] < 35  # said well before the end


def test_a_collapsed_run_may_start_again_with_a_lower_beta(tmp_path, capsys):
    with pytest.raises(CollapsedError):  # a millionfold KL is too dear even at a 27th
        train(tiny(tmp_path, *DEAR, "train.on_collapse=restart"))
    assert capsys.readouterr().out.count("restart ") == 3
    log = rows(tmp_path / "tiny")
    assert [row["step"] for row in log] == list(range(1, len(log) + 1))
    assert log[-1]["kl_weight"] == pytest.approx(1e6 / 27)
    run = train(tiny(tmp_path, *DEAR), resume=True)  # goes on with the beta of the last attempt
    assert rows(run)[-1]["step"] == 60
    assert rows(run)[-1]["kl_weight"] == pytest.approx(1e6 / 27)


def test_own_images_train_encode_and_report(tmp_path, monkeypatch):
    """From a relative path and another folder: what the run remembers of its data must not depend on where one stands."""
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", images)
    monkeypatch.chdir(tmp_path)
    run = train(load_config(TINY, ["runs_dir=runs", "data.kind=array", "data.path=mine.npz"])).resolve()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert cli.main(["encode", str(run), "--data", str(tmp_path / "mine.npz"), "--output", "latents.npz"]) == 0
    with np.load("latents.npz") as latents:
        assert latents["mu"].shape == latents["var"].shape == (40, 4)
        assert (latents["var"] > 0).all()
    assert cli.main(["report", str(run)]) == 0
    scores = json.loads((run / "report/metrics.json").read_text())
    assert scores["num_images"] == 4
    assert "linear_r2" not in scores


# ---- ranks: one launch of the real launcher, several runs inside


@pytest.fixture(scope="module", autouse=True)
def axes_are_turned():
    """As in the ranks' own runs."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(turning, "live_dims", all_live)
        patched.setattr(turning, "IMAGES", FEW)
        yield


def launch(folder: Path, *command) -> subprocess.CompletedProcess:
    """Two ranks on this machine through the deepspeed command, standing in a folder."""
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [launcher, "--num_accelerators", "2", "--master_port", str(29600 + os.getpid() % 300), *command]
    environment = os.environ | {"PATH": f"{launcher.parent}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, alone):
    """All runs of two ranks, made by the first test process that asks; they take both cores anyway."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two_ranks"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for stage in STAGES:
                shutil.copytree(alone[True], folder / f"from_one{stage}")
                shutil.rmtree(folder / f"from_one{stage}/checkpoints/step_12")
            done = launch(folder, ROOT / "tests/ranks_worker.py", folder)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            assert re.search("step 6: [1-4] latent axes turned", done.stdout), done.stdout
            (folder / "done").touch()
    return folder


def test_the_launcher_trains_and_reports_from_any_folder(tmp_path, finished):
    folder = tmp_path / "another folder"
    folder.mkdir()
    done = launch(folder, ROOT / "sami_fast/train.py", "--config", TINY)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.rstrip().splitlines().count("runs/tiny/report/index.html") == 1
    losses = [[row["loss_nats"] for row in rows(run)] for run in (folder / "runs/tiny", finished)]
    np.testing.assert_allclose(*losses, rtol=5e-5)


def test_the_launcher_passes_on_the_status_of_a_mistake(tmp_path):
    done = launch(tmp_path, ROOT / "sami_fast/train.py", "--config", TINY, "train.batch_size=7")
    assert done.returncode == 2
    assert done.stderr.count("sami-fast: train.batch_size: expected a multiple of 2") == 1


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of the same settings, with free bits granted to the whole batch and to none."""
    folder = tmp_path_factory.mktemp("alone")
    return {
        free_bits: train(tiny(folder / f"free_bits_{free_bits}", *COMMON, *([] if free_bits else ["objective.free_bits=0"])))
        for free_bits in (True, False)
    }


def assert_same_run(run: Path, expected: Path):
    """Loss curve and every parameter, to float32 rounding."""
    for key in ("loss_nats", "kl_nats", "kl_weight"):
        found, wanted = ([row[key] for row in rows(folder)] for folder in (run, expected))
        np.testing.assert_allclose(found, wanted, rtol=5e-5, err_msg=key)
    assert weights(run).keys() == weights(expected).keys()
    for name, value in weights(expected).items():
        torch.testing.assert_close(weights(run)[name], value, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_equal_one_process(variant, two_ranks, alone):
    assert_same_run(two_ranks / variant, alone["objective.free_bits=0" not in VARIANTS[variant]])


@pytest.mark.parametrize("mode", MODES)
def test_two_engines_equal_one_on_a_trained_denoiser(mode, two_ranks):
    assert_same_run(two_ranks / f"{mode}3", two_ranks / f"{mode}0")


@pytest.fixture(scope="module")
def staged_alone(tmp_path_factory):
    """A staged run in one process, which settles its noise levels and its beta by what it sees."""
    return train(settings(str(tmp_path_factory.mktemp("alone")), "tiny", *STAGED))


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_take_the_stages_of_one_process(stage, two_ranks, staged_alone):
    run = two_ranks / f"staged{stage}/tiny"
    assert_same_run(run, staged_alone)
    of_denoiser = [next((folder.parent / "denoisers").iterdir()) for folder in (run, staged_alone)]
    assert_same_run(*of_denoiser)
    assert of_denoiser[0].name == of_denoiser[1].name


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_go_on_where_they_were_stopped(stage, two_ranks):
    assert_same_weights(two_ranks / f"resumed{stage}", two_ranks / f"zero{stage}")


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_goes_on_where_two_were_stopped(stage, two_ranks, alone, tmp_path):
    shutil.copytree(two_ranks / f"stopped{stage}", tmp_path / "tiny")
    run = train(tiny(tmp_path, *COMMON), resume=True)
    assert len(rows(run)) == 12
    assert_same_run(run, alone[True])


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_go_on_where_one_was_stopped(stage, two_ranks, alone):
    assert_same_run(two_ranks / f"from_one{stage}", alone[True])


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_rank_is_survived(stage, two_ranks, tmp_path):
    """SIGKILL to one of two ranks after a checkpoint; the launcher ends the other, and the next launch goes on."""
    killed = launch(tmp_path, ROOT / "tests/ranks_worker.py", tmp_path, f"kill{stage}")
    assert killed.returncode != 0
    assert newest_whole(tmp_path / f"zero{stage}/checkpoints").name == "step_8"
    done = launch(tmp_path, ROOT / "tests/ranks_worker.py", tmp_path, f"resume{stage}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert_same_weights(tmp_path / f"zero{stage}", two_ranks / f"zero{stage}")


def test_the_denoiser_lies_in_parts(two_ranks):
    """At ZeRO-3 each of two ranks holds half of every weight but the vectors."""
    for rank in (0, 1):
        held = json.loads((two_ranks / f"parts_{rank}.json").read_text())
        assert held["partitioned"] > 10
        assert held["bytes"] < 0.6 * held["whole"]


def test_bad_numbers_on_one_rank_stop_all(two_ranks):
    messages = {(two_ranks / f"stopped_{rank}.txt").read_text() for rank in (0, 1)}
    assert len(messages) == 1
    assert "step 0: the denoiser's error is nan" in messages.pop()


# ---- kill and resume


@pytest.mark.parametrize("harm", ["truncate", "flip", "lose", "manifest"])
def test_damaged_checkpoint_is_passed_over(harm, tmp_path, capsys, finished):
    shutil.copytree(finished, tmp_path / "tiny")
    newest = tmp_path / "tiny/checkpoints/step_12"
    file = newest / ("manifest.json" if harm == "manifest" else WEIGHTS)
    content = file.read_bytes()
    if harm == "lose":
        file.unlink()
    elif harm == "flip":
        file.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    else:
        file.write_bytes(content[: len(content) // 2])
    run = train(tiny(tmp_path), resume=True)
    said = capsys.readouterr().out
    assert "step_12" in said
    assert "falling back" in said
    assert f"resumed from {tmp_path / 'tiny/checkpoints/step_8'}" in said
    assert_same_weights(run, finished)
    assert [row["step"] for row in rows(run)] == list(range(1, 13))


def test_the_next_start_removes_what_kills_left(tmp_path, finished):
    """In every folder of the run, by this version or an earlier one."""
    run = shutil.copytree(finished, tmp_path / "tiny")
    for folder in (run, run / "model", run / "report", run / "checkpoints"):
        folder.mkdir(exist_ok=True)
        for name in ("0123456789abcdef", "4711-index.html"):
            (folder / f".partial-{name}").write_text("half")
    (run / "checkpoints/.partial-step_3").mkdir()
    train(tiny(tmp_path), resume=True)
    assert not list(run.rglob(".partial-*"))


def test_resume_of_a_finished_run_changes_nothing(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "tiny")
    assert_same_weights(train(tiny(tmp_path), resume=True), finished)


def test_two_processes_do_not_share_a_folder(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "tiny")
    busy = RunFolder(tmp_path / "tiny")
    busy.claim(resume=True, overwrite=False)
    with pytest.raises(UserError, match="another process is training there"):
        train(tiny(tmp_path), resume=True)
    busy.release()
    assert_same_weights(train(tiny(tmp_path), resume=True), finished)


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
def test_a_folder_of_something_else_is_left_alone(flag, tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/config.yaml").write_text("my: precious")
    with pytest.raises(UserError, match="expected a run folder"):
        train(tiny(tmp_path), **{flag: True})
    assert [p.name for p in (tmp_path / "tiny").iterdir()] == ["config.yaml"]
    assert (tmp_path / "tiny/config.yaml").read_text() == "my: precious"


@pytest.mark.parametrize("manifest", ["{}", "[]", '{"files": {}}', "not json"])
def test_damaged_manifest_is_passed_over(manifest, tmp_path, finished):
    shutil.copytree(finished, tmp_path / "tiny")
    (tmp_path / "tiny/checkpoints/step_12/manifest.json").write_text(manifest)
    assert_same_weights(train(tiny(tmp_path), resume=True), finished)


def test_no_flipped_bit_of_a_manifest_is_believed(tmp_path, finished):
    """Every bit of every digit of the two counts, and bits anywhere: either the manifest says the same as before, or it is not used."""
    checkpoint = shutil.copytree(finished / "checkpoints/step_12", tmp_path / "step_12")
    file, chance = checkpoint / "manifest.json", random.Random(3)
    content, stated = file.read_bytes(), checkpoints.read_manifest(checkpoint)
    assert stated["adam_steps"] == stated["step"] == 12
    counts = [content.index(key) + len(key) + place for key in (b'"step": ', b'"adam_steps": ') for place in (0, 1)]
    places = [
        *((place, bit) for place in counts for bit in range(8)),
        *((chance.randrange(len(content)), chance.randrange(8)) for _ in range(300)),
    ]
    for place, bit in places:
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        assert checkpoints.read_manifest(checkpoint) in (None, stated), (place, bit)
        assert checkpoints.damage(checkpoint) or checkpoints.read_manifest(checkpoint) == stated
        checkpoints.refuse_other_formats(tmp_path)  # it is damaged, not of another version


NESTED: list = []
for _ in range(40):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", [3]),
        ("files", {"../../outside": "0" * 64}),
        ("files", ["training.safetensors"]),
        ("step", "12"),
        ("step", 11),
        ("step", True),
        ("adam_steps", -1),
        ("adam_steps", 10**400),
        ("adam_steps", 13),
        ("world_size", None),
        ("architecture", "encoder"),
        ("settings", NESTED),
        ("validation_nats", "low"),
        ("validation_nats", 10**400),
        ("state", []),
        ("state", {}),
        ("state.seconds", "long"),
        ("state.warned", None),
        ("state.pending", 5),
        ("state.pending", [11, ["nan"]]),
        ("state.kl_weight", {"controlled": "x"}),
        ("state.kl_weight", {"observe": 1}),
        ("state.kl_weight.scale", 0),
        ("state.kl_weight.information", [1.0]),
    ],
)
def test_a_forged_manifest_is_passed_over(name, value, tmp_path, finished, capsys):
    shutil.copytree(finished, tmp_path / "tiny")

    def forge(stated):
        *above, key = name.split(".")
        for part in above:
            stated = stated[part]
        stated[key] = value

    _restate(tmp_path / "tiny/checkpoints/step_12/manifest.json", forge, forge=True)
    assert_same_weights(train(tiny(tmp_path), resume=True), finished)
    assert f"resumed from {tmp_path / 'tiny/checkpoints/step_8'}" in capsys.readouterr().out


@pytest.mark.parametrize("settings", [5, {"train": 5}, {"train": {"steps": [12]}}])
def test_a_manifest_of_strange_settings_is_one_of_another_run(settings, tmp_path, finished):
    shutil.copytree(finished, tmp_path / "tiny")
    forged = {"data": settings} if settings == 5 else settings
    _restate(tmp_path / "tiny/checkpoints/step_12/manifest.json", lambda stated: stated["settings"].update(forged), forge=True)
    with pytest.raises(UserError, match="belongs to a run with other settings"):
        train(tiny(tmp_path), resume=True)


def _replace(tensors, name, value):
    tensors[name] = value(tensors[name])


@pytest.mark.parametrize(
    ("harm", "fragment"),
    [
        (lambda t: t.pop("encoder.mu.weight/exp_avg"), "lacks encoder.mu.weight/exp_avg"),
        (lambda t: t.update(more=torch.zeros(1)), "has unexpected more"),
        (lambda t: _replace(t, "encoder.mu.weight/weight", lambda v: v[:1]), "expected encoder.mu.weight/weight of shape [4,"),
        (lambda t: _replace(t, "encoder.mu.weight/averaged", lambda v: v * float("nan")), "encoder.mu.weight/averaged holds NaN"),
        (lambda t: _replace(t, "encoder.mu.weight/exp_avg_sq", lambda v: v.to(torch.int8)), "found torch.int8"),
    ],
)
def test_forged_weights_are_passed_over(harm, fragment, tmp_path, finished, capsys):
    """Every hash fits, and they are not the weights of this run."""
    shutil.copytree(finished, tmp_path / "tiny")
    checkpoint = tmp_path / "tiny/checkpoints/step_12"
    tensors = load_file(checkpoint / WEIGHTS)
    harm(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, checkpoint / WEIGHTS)
    _restate(
        checkpoint / "manifest.json",
        lambda stated: stated.update(files={WEIGHTS: checkpoints.sha256_of(checkpoint / WEIGHTS)}),
        forge=True,
    )
    assert_same_weights(train(tiny(tmp_path), resume=True), finished)
    said = capsys.readouterr().out
    assert fragment in said
    assert "falling back to the checkpoint before it" in said


def test_a_pipe_in_the_place_of_a_manifest_is_passed_over(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "tiny")
    manifest = tmp_path / "tiny/checkpoints/step_12/manifest.json"
    manifest.unlink()
    os.mkfifo(manifest)
    assert_same_weights(train(tiny(tmp_path), resume=True), finished)


def test_a_run_of_an_earlier_version_is_left_alone(tmp_path, finished):
    """Its checkpoints are neither damaged nor readable; its config is read, with the keys of then."""
    run = tmp_path / "tiny"
    shutil.copytree(finished, run)
    for manifest in run.glob("checkpoints/*/manifest.json"):
        facts = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({key: value for key, value in facts.items() if key not in ("format", "state", "adam_steps", HASH)}))
    text = (run / "config.yaml").read_text()
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="expected format 3, found 1; finish the run with the version"):
        train(tiny(tmp_path), resume=True)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    old = tmp_path / "old.yaml"
    old.write_text(text.replace("  denoiser_warmup", "  denoiser_from: ''\n  denoiser_warmup"))
    assert load_config(str(old)) == load_config(str(run / "config.yaml"))
    old.write_text("train: {mode: frozen, denoiser_from: elsewhere}")
    assert load_config(str(old)).denoiser.pretrained == "elsewhere"


def test_a_run_that_ended_before_its_first_step_does_not_stand_in_the_way(tmp_path):
    """Killed between claiming its folder and the first step, it has nothing that could be lost."""
    trainer = Trainer(tiny(tmp_path), resume=False, overwrite=False)
    trainer.feed.close()
    trainer.run_folder.release()
    again = RunFolder(tmp_path / "tiny")
    again.check(resume=False, overwrite=False)
    again.append({"step": 1})
    with pytest.raises(UserError, match="holds a run already"):
        again.check(resume=False, overwrite=False)


def test_images_need_no_side_that_can_be_halved(tmp_path, monkeypatch):
    """28 pixels, as MNIST's, come to 7 after two halvings: here 14 after one. They are taken as they are, or resized if asked."""
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (40, 14, 14), dtype=np.uint8)
    np.save("mine.npy", images)
    settings = [
        "data.kind=array",
        "data.path=mine.npy",
        "data.image_size=0",
        "encoder.channels=[8,8,8]",
        "denoiser.channels=[4,4,8]",
        "train.steps=5",
    ]
    config = tiny(tmp_path, *settings)
    assert torch.equal(open_dataset(config.data, 0).images(torch.tensor([3]))[0, 0], torch.from_numpy(images[3]).float() / 127.5 - 1)
    assert Sami.from_pretrained(train(config)).image_shape == (1, 14, 14)
    fitted = tiny(tmp_path, *settings, "name=fitted", "data.channels=3", "data.image_size=9")
    assert Sami.from_pretrained(train(fitted)).image_shape == (3, 9, 9)


def test_resume_without_a_checkpoint_starts(tmp_path):
    assert rows(train(tiny(tmp_path, "train.steps=5"), resume=True))[0]["step"] == 1


def test_resume_without_a_checkpoint_goes_on_with_its_own_settings_alone(tmp_path):
    run = train(tiny(tmp_path, "train.steps=5"))
    shutil.rmtree(run / "checkpoints")
    before = {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}
    with pytest.raises(UserError, match=r"tiny: belongs to a run with other settings: train\.steps \(5 there, 6 here\); set name="):
        train(tiny(tmp_path, "train.steps=6"), resume=True)
    assert {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()} == before
    train(tiny(tmp_path, "train.steps=5", "log.every=2"), resume=True)


# ---- what stops a run


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (["encoder.latent_size=5"], "holds another architecture: encoder.latent_size (4 there, 5 here)"),
        (["denoiser.channels=[4,16]"], "holds another architecture: denoiser.channels"),
        (["data.channels=2"], "holds another architecture: denoiser.image_channels (1 there, 2 here)"),
        (["engine.precision=bf16"], "belongs to a run with other settings: engine.precision ('fp32' there, 'bf16' here)"),
        (["optimizer.ema_decay=0"], "optimizer.ema_decay (0.9 there, 0.0 here)"),
        (["seed=1"], "seed (0 there, 1 here)"),
        (["train.steps=20"], "train.steps (12 there, 20 here)"),
        (["data.disks.edge_slope=1"], "data.disks.edge_slope (1.5 there, 1.0 here)"),
    ],
)
def test_resume_with_what_does_not_fit(overrides, fragment, tmp_path, finished):
    shutil.copytree(finished, tmp_path / "tiny")
    before = (tmp_path / "tiny/config.yaml").read_text()
    with pytest.raises(UserError, match="step_12") as caught:
        train(tiny(tmp_path, *overrides), resume=True)
    assert fragment in str(caught.value)
    assert (tmp_path / "tiny/config.yaml").read_text() == before


def _main_error(arguments, capsys):
    assert main(arguments) == 2
    message = capsys.readouterr().err.strip()
    assert message.count("\n") == 0
    return message


@pytest.mark.parametrize(
    ("prepare", "arguments", "fragment"),
    [
        (None, [], "holds a run already"),
        (lambda run: (run / "thesis.doc").touch(), ["--overwrite"], "expected a run folder, and this one holds thesis.doc"),
        (lambda run: (shutil.rmtree(run), run.write_text("a file")), [], "expected a run folder, found a file"),
        (None, ["--resume", "train.batch_size=9", "engine.gradient_accumulation=2"], "train.batch_size: expected a multiple of 2"),
        (
            None,
            ["--overwrite", f"train.batch_size={1 << 40}"],
            f"train.batch_size: a step of {1 << 40} images at a time: not enough",
        ),
        (None, ["--overwrite", "denoiser.channels=[4,4,4,4,4]"], "image size 8 is below 16"),
        (None, ["name=f", "train.mode=frozen", "denoiser.pretrained=nowhere"], "nowhere: no config.json there"),
        (None, ["name=f", "train.mode=frozen", "denoiser.pretrained={run}", "data.channels=3"], "its images are [1, 8, 8]"),
        (None, ["name=f", "train.mode=frozen", "denoiser.pretrained={run}", "schedule.kind=cosine"], "kind=uniform_logsnr"),
        (
            lambda run: (run / "model/model.safetensors").write_bytes(b"0" * 50),
            ["name=f", "train.mode=frozen", "denoiser.pretrained={run}"],
            "damaged or not a safetensors file",
        ),
        (
            lambda run: (run / "model/config.json").write_text('{"format": "other"}'),
            ["name=f", "train.mode=frozen", "denoiser.pretrained={run}"],
            "expected format sami-fast/1, found 'other'",
        ),
    ],
)
def test_folder_and_model_mistakes(prepare, arguments, fragment, tmp_path, capsys, finished):
    run = tmp_path / "tiny"
    shutil.copytree(finished, run)
    if prepare:
        prepare(run)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    message = _main_error(["--config", TINY, f"runs_dir={tmp_path}", *(a.format(run=run) for a in arguments)], capsys)
    assert fragment in message
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before  # nothing lost, nothing half-written


@pytest.mark.parametrize(("network", "term"), [("encoder", "the encoder's KL"), ("denoiser", "the denoiser's error")])
@pytest.mark.parametrize("at_step", [6, 8])
def test_nan_stops_the_run_and_names_step_and_term(network, term, at_step, tmp_path):
    trainer = Trainer(tiny(tmp_path, "log.every=5"), resume=False, overwrite=False)
    update = trainer.engine.update

    def poisoning_update(step, losses):
        if step == at_step:
            with torch.no_grad():
                next(getattr(trainer.model, network).parameters()).view(-1)[0] = float("nan")
        return update(step, losses)

    trainer.engine.update = poisoning_update
    with pytest.raises(NonFiniteError, match=f"step {at_step}: {term} is nan"):
        trainer.run()
    whole = newest_whole(trainer.checkpoints)
    assert whole.name == ("step_4" if at_step == 6 else "step_8")
    assert all(value.isfinite().all() for value in load_file(whole / WEIGHTS).values())


def test_full_disk_on_one_rank_stops_all(two_ranks):
    messages = {(two_ranks / f"full_{rank}.txt").read_text() for rank in (0, 1)}
    assert len(messages) == 1
    assert "cannot write a checkpoint (No space left)" in messages.pop()
    assert not list((two_ranks / "full/checkpoints").iterdir())


def test_bad_numbers_after_the_last_update_stop_too(tmp_path):
    trainer = Trainer(tiny(tmp_path, "checkpoint.every=100"), resume=False, overwrite=False)
    update = trainer.engine.update

    def overshooting_update(step, losses):
        measured = update(step, losses)
        if step == 11:
            with torch.no_grad():
                trainer.engine.averaged["denoiser.out.weight"].fill_(1e30)  # finite, but what follows is not
        return measured

    trainer.engine.update = overshooting_update
    with pytest.raises(NonFiniteError, match=r"step 11: the update left a validation loss of .*; stopped before the first checkpoint"):
        trainer.run()
    assert not checkpoints.list_checkpoints(trainer.checkpoints)


@pytest.mark.parametrize(
    ("variables", "fragment"),
    [
        ({"RANK": "0"}, "WORLD_SIZE: missing while RANK is set"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK: expected a whole number, found 'x'"),
    ],
)
def test_strange_environments_get_one_sentence(variables, fragment, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["--config", TINY, f"runs_dir={tmp_path}"]) == 2
    message = capsys.readouterr().err
    assert fragment in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("backend", "fragment"),
    [
        ("tpu", "SAMI_FAST_BACKEND: expected auto, reference, cpp, triton or cuda, found 'tpu'"),
        ("triton", "triton (SAMI_FAST_BACKEND) cannot run here: it needs tensors on a CUDA device"),
    ],
)
def test_a_backend_that_cannot_run_is_said_before_the_folder_is_touched(backend, fragment, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"SAMI_FAST_BACKEND": backend}
    if backend == "triton":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "sami_fast.train", "--config", TINY, f"runs_dir={tmp_path}/runs"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert fragment in result.stderr
    assert not (tmp_path / "runs").exists()


def test_nan_exits_with_status_one(tmp_path, capsys):
    arguments = ["--config", TINY, f"runs_dir={tmp_path}", "optimizer.lr=1e30", "optimizer.clip=0"]
    assert main(arguments) == 1
    message = capsys.readouterr().err.strip()
    assert message.startswith("sami-fast: step ")
    assert "\n" not in message


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1.7 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1700k", "none", folder], check=False).returncode:
        pytest.skip("mounting a small file system needs rights this user does not have")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk_gets_one_sentence_and_keeps_the_last_checkpoint(small_disk, capsys):
    # Each checkpoint takes about 700 kB: the first two fit, the third does not.
    arguments = ["--config", TINY, f"runs_dir={small_disk}", "encoder.channels=[24,48]", "checkpoint.keep_last=5"]
    message = _main_error(arguments, capsys)
    assert "cannot write a checkpoint (the disk is full)" in message
    run = small_disk / "tiny"
    assert newest_whole(run / "checkpoints") is not None
    assert not list(run.rglob(".partial-*"))


def test_a_disk_without_room_for_a_checkpoint_is_said_before_anything_is_written(small_disk, capsys):
    message = _main_error(["--config", TINY, f"runs_dir={small_disk}", "encoder.channels=[128,128]"], capsys)
    assert re.search(r"tiny: expected room for a checkpoint of \d+\.\d MB, found 1\.\d MB; free some, set runs_dir=", message)
    assert not list(small_disk.iterdir())


def _numpy_too_large():
    return np.empty(1 << 50)


def _torch_too_large():
    return torch.empty(1 << 50)


@pytest.mark.parametrize("allocate", [_numpy_too_large, _torch_too_large])
def test_too_little_memory_is_said_in_one_sentence(allocate):
    with pytest.raises(UserError, match=r"^train\.batch_size: not enough memory; lower it$"), enough_memory("train.batch_size", "lower it"):
        allocate()


def test_other_errors_are_not_taken_for_too_little_memory():
    with pytest.raises(RuntimeError, match="shape"), enough_memory("train.batch_size", "lower it"):
        torch.zeros(3).view(2, 2)
