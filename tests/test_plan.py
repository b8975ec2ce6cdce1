"""What a run will cost: FLOPs against those of real steps, memory and wire against what two ranks of the real launcher hold and send."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import plan_worker
import pytest
import torch
from torch import nn

from benchmarks.counting import Meter
from benchmarks.measure import peak_bytes
from sami_fast import cli, plan
from sami_fast.config import load_config
from sami_fast.engine.compiled import recomputing
from sami_fast.errors import UserError
from sami_fast.methods.build import build_model
from sami_fast.step import Draw, Objective, denoising_step, training_step

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (3, 16, 16)
SMALL = [
    *("data.image_size=16", "data.channels=3", "train.batch_size=6", "objective.noise_levels=2"),
    *("encoder.channels=[8,16]", "encoder.blocks=1", "denoiser.channels=[8,16]", "denoiser.embedding_size=16"),
]


@cache
def counted(*overrides):
    """A config, its encoder and its denoiser."""
    config = load_config(None, [*SMALL, *overrides])
    return config, *plan.count_networks(config, plan.networks_of(config, SHAPE), SHAPE)


def real_step(config, method):
    """One step of a whole batch as training takes it, gradients included."""
    model = build_model(config, SHAPE)
    nn.init.normal_(model.denoiser.out.weight, std=0.02)
    denoiser = recomputing(model.denoiser, config)
    batch = config.train.batch_size
    x_0, draw, objective = torch.rand(batch, *SHAPE), Draw(1, 2, torch.arange(batch), batch), Objective(**asdict(config.objective))

    def run():
        if config.method == "diffae":
            model.training_loss(x_0, draw, 0.1, model.parts(objective=objective))[0].backward()
        elif method == "warmup":
            denoising_step(denoiser, model.schedule, x_0, draw, objective)[0].backward()
        else:
            training_step(model.encoder, denoiser, model.schedule, x_0, draw, objective, 0.1, score_method=method)[0].backward()
        for parameter in model.parameters():
            parameter.grad = None

    return run


# ---- counted


def test_parameters_are_those_of_the_networks():
    config, *networks = counted()
    model = build_model(config, SHAPE)
    for network, real in zip(networks, model.networks.values(), strict=True):
        assert network.parameters == network.trained == sum(p.numel() for p in real.parameters())
        assert network.sizes == tuple(p.numel() for p in real.parameters())


@pytest.mark.parametrize("method", ["sweeps", "dual", "reverse"])
def test_flops_of_a_step(method):
    """Exactly, layer by layer: 3F of the denoiser, 3F and 6F or 8F of the encoder, less what an image's gradient would have cost."""
    flops = plan.step_flops(*counted(), method)
    config = counted()[0]
    with Meter() as real:
        real_step(config, method)()
    # torch's own double backward of a strided convolution computes a weight gradient somewhat larger than the weight, and cuts it
    assert sum(flops.values()) == pytest.approx(real.flops.total(), rel=0.005 if method == "reverse" else 0)
    with Meter() as warmup:
        real_step(config, "warmup")()
    assert flops["denoiser"] == warmup.flops.total()


def test_the_score_costs_6f_or_8f():
    config, encoder, partner = counted("encoder.channels=[32,32]", "encoder.blocks=3", "objective.noise_levels=1", "train.batch_size=1")
    for method, count in (("sweeps", 6), ("reverse", 6), ("dual", 8)):
        assert plan.step_flops(config, encoder, partner, method)["score"] / encoder.forward == pytest.approx(count, rel=0.05)


def test_flops_of_a_baseline():
    config, encoder, partner = counted("method=diffae")
    with Meter() as real:
        real_step(config, "")()
    assert sum(plan.step_flops(config, encoder, partner, "sweeps").values()) == real.flops.total()


def test_flops_of_a_frozen_denoiser():
    config, encoder, partner = counted()
    frozen = plan.Network(**asdict(partner) | {"trained": 0, "sizes": ()})
    assert plan.step_flops(config, encoder, frozen, "sweeps")["denoiser"] == 12 * partner.forward


def test_recomputing_costs_flops_and_keeps_less():
    again, encoder, twice = counted("engine.checkpoint_activations=true")
    _, _, once = counted()
    with Meter() as real:
        real_step(again, "sweeps")()
    assert sum(plan.step_flops(again, encoder, twice, "sweeps").values()) == real.flops.total()
    assert 0 == once.again < twice.again < once.forward
    assert twice.kept < 0.6 * once.kept


def test_attention_is_counted_in_products():
    """Two products of 2 S^2 D N in a forward over S = 8 * 8 tokens."""
    _, encoder, _ = counted("encoder.attention=[8]")
    assert encoder.attention == 2 * 2 * 64**2 * 8
    assert encoder.forward > counted()[1].forward  # q, k, v and out are convolutions


# ---- memory of a micro-batch


@pytest.mark.parametrize(
    "overrides",
    [
        ["engine.score=sweeps"],
        ["engine.score=dual"],
        ["engine.score=reverse"],
        ["encoder.attention=[8]", "denoiser.attention=[16]"],
        ["engine.checkpoint_activations=true"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("wide", ["encoder", "denoiser"])
def test_activations_grow_as_planned(overrides, wide):
    """The most that torch's allocator holds in real steps, per image, is within 12 % of the plan's."""
    wider = {"encoder": ["encoder.channels=[32,32]"], "denoiser": ["denoiser.channels=[32,32]"]}[wide]
    config, encoder, partner = counted(*wider, *overrides)
    method = "sweeps" if config.engine.score == "auto" else config.engine.score
    peaks = []
    for batch in (4, 12):
        step = real_step(load_config(None, [*SMALL, *wider, *overrides, f"train.batch_size={batch}"]), method)
        step()
        peaks.append(peak_bytes(step))
    assert plan.activations(config, encoder, partner, 1) == pytest.approx((peaks[1] - peaks[0]) / 8, rel=0.12)


def test_bf16_halves_activations_and_nothing_else():
    found = [plan.plan(load_config(None, [*SMALL, f"engine.precision={p}"]), [2]) for p in ("fp32", "bf16")]
    copies = 2 * sum(n.parameters for n in found[0].networks.values())
    full, half = (f.rows[1].memory for f in found)
    assert half.activations == 0.5 * full.activations + copies
    assert (half.weights, half.optimizer) == (full.weights, full.optimizer)


def test_a_pretrained_denoiser(tmp_path):
    """Frozen it costs one forward and keeps nothing; fine-tuned it is like any other. Its image size is the data's."""
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    unet = diffusers.UNet2DModel(sample_size=16, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, **blocks)
    unet.save_pretrained(tmp_path)
    diffusers.DDPMScheduler().save_pretrained(tmp_path)
    small = [o for o in SMALL if not o.startswith(("data.", "denoiser."))] + [
        "data.kind=image_folder",
        "data.path=not there",
        f"denoiser.pretrained={tmp_path}",
    ]
    frozen, tuned = (plan.plan(load_config(None, [*small, f"train.mode={mode}"]), [2]) for mode in ("frozen", "finetune"))
    assert frozen.image_shape == (3, 16, 16)
    one, other = frozen.networks["denoiser"], tuned.networks["denoiser"]
    assert one.parameters == other.trained == sum(p.numel() for p in unet.parameters())
    assert one.trained == 0
    assert frozen.flops["denoiser"] == 12 * (one.forward + one.attention)
    assert tuned.flops["denoiser"] == pytest.approx(3 * frozen.flops["denoiser"], rel=0.1)
    before, after = (found.rows[0].memory for found in (frozen, tuned))
    assert before.weights == after.weights
    assert before.gradients == 4 * frozen.networks["encoder"].parameters
    assert after.gradients == after.weights
    assert before.activations < 0.6 * after.activations


# ---- one rank's share, by arithmetic

NETWORK = plan.Network(1000, 1000, (400, 600), *[0] * 9)


@pytest.mark.parametrize("stage", plan.STAGES)
def test_one_rank_sends_nothing(stage):
    assert plan.wire([NETWORK], load_config(None, []), stage, 1) == 0


@pytest.mark.parametrize(
    ("stage", "micro_batches", "sent"),
    [
        (0, 1, 4000),  # all-reduce: 2 * 1/2 * 4000 bytes
        (0, 4, 4000),  # once a step
        (1, 1, 6000),  # and the updated weights: 1/2 * 4000
        (1, 4, 6000),
        (2, 1, 6000),
        (2, 4, 18000),  # in every micro-batch
        (3, 1, 4000),  # gather and scatter: 1/2 * 4000 each
        (3, 4, 16000),
    ],
)
def test_two_ranks_send(stage, micro_batches, sent):
    config = load_config(None, ["train.batch_size=64", f"engine.gradient_accumulation={micro_batches}"])
    assert plan.wire([NETWORK], config, stage, 2) == sent


@pytest.mark.parametrize(("stage", "sent"), [(0, 4000), (1, 6000), (2, 18000), (3, 24000)])
def test_two_ranks_send_by_gloo(stage, sent):
    """Where only a part of a sum is asked for it adds all of it up on every rank."""
    config = load_config(None, ["train.batch_size=64", "engine.gradient_accumulation=4"])
    assert plan.wire([NETWORK], config, stage, 2, "gloo") == sent


def test_gloo_sends_more_at_stage_3_alone(capsys):
    sent = []
    for collectives in plan.COLLECTIVES:
        status, text, _ = run(capsys, "disks", "--gpus", "2", "--json", "--mfu", "0.5", "--collectives", collectives)
        assert status == 0
        assert json.loads(text)["assumed"]["collectives"] == collectives
        sent.append({row["stage"]: row["sent"] for row in json.loads(text)["estimated"]})
    by_nccl, by_gloo = sent
    assert by_gloo[3] > 1.2 * by_nccl[3]
    assert {stage for stage in by_nccl if by_gloo[stage] != by_nccl[stage]} == {3}


def test_weights_too_large_to_stay_are_gathered_twice():
    large = plan.Network(10**9, 10**9, (10**9,), *[0] * 9)
    assert plan.wire([large], load_config(None, []), 3, 2) == 0.5 * 3 * 4e9


def test_a_frozen_network_has_neither_gradients_nor_moments():
    frozen = plan.Network(1000, 0, (), *[0] * 9)
    config = load_config(None, ["optimizer.ema_decay=0.9"])
    for stage in (0, 1, 2):
        memory = plan.state([frozen], config, stage, 2)
        assert memory.gpu == memory.weights == 4000
        assert plan.wire([frozen], config, stage, 2) == 0


def test_touched_parameters_are_held_whole():
    assert plan.touched((400, 600), 2) == 1000  # the first half ends inside the second parameter
    assert plan.touched((500, 500), 2) == 500
    assert plan.touched((10, 10, 10, 970), 4) == 1000


def test_offload_moves_moments_to_the_host():
    there, here = (
        plan.state([NETWORK], load_config(None, ["engine.zero_stage=2", f"engine.offload={o}"]), 2, 2) for o in ("optimizer", "none")
    )
    assert there.optimizer == there.gradients == 0
    assert there.host == here.optimizer + here.gradients


def test_offload_of_parameters_leaves_nothing_but_whole_weights_in_use():
    config = load_config(None, ["engine.zero_stage=3", "engine.offload=parameters", "optimizer.ema_decay=0.9"])
    memory = plan.state([NETWORK], config, 3, 2)
    assert memory.gpu == memory.gathered + memory.buckets
    assert memory.host == 0.5 * 4000 * 5  # weights, gradients, two moments, average


def test_a_row_that_does_not_fit():
    config = load_config(None, [*SMALL, "train.batch_size=1048576"])
    fits = {row.gpus: row.fits for row in plan.plan(config, [1, 1024], "a100-80").rows}
    assert fits == {1: False, 1024: True}


def test_a_ring_between_machines_is_as_fast_as_all_their_adapters():
    gpu = plan.GPUS["a100-80"]
    assert gpu.link(8) == pytest.approx(plan.LINK_SHARE * 300e9)
    assert gpu.link(16) == pytest.approx(plan.LINK_SHARE * 200e9)


# ---- against two ranks


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """{stage: [what each rank held and sent]}."""
    folder = tmp_path_factory.mktemp("plan")
    launcher = Path(sys.executable).parent / "deepspeed"
    port = str(29900 + os.getpid() % 90)
    environment = os.environ | {"PATH": f"{launcher.parent}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [launcher, "--num_accelerators", "2", "--master_port", port, ROOT / "tests/plan_worker.py", folder],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    return {stage: [ranks[str(stage)] for ranks in found] for stage in plan_worker.STAGES}


@cache
def planned_rows():
    """A row for each stage, of two ranks."""
    return plan.plan(plan_worker.config_of(0, "runs"), [2]).rows


@pytest.mark.parametrize("what", ["weights", "gradients", "optimizer", "averaged", "buckets", "sent"])
@pytest.mark.parametrize("stage", plan_worker.STAGES)
def test_two_ranks_hold_and_send_what_was_planned(stage, what, two_ranks):
    row = planned_rows()[stage]
    planned = row.sent if what == "sent" else getattr(row.memory, what)
    measured = max(rank[what] for rank in two_ranks[stage])
    if what == "buckets" and stage == 0:  # made and freed inside one call
        assert planned == row.memory.gradients
        return
    assert measured > 0
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("stage", plan_worker.STAGES)
def test_networks_that_are_there_hold_what_was_planned(stage):
    """What the rehearsal of a run asks for."""
    config = plan_worker.config_of(stage, "runs")
    found = plan.held(build_model(config, plan.image_shape_of(config)), config, 2)
    assert replace(found, activations=planned_rows()[stage].memory.activations) == planned_rows()[stage].memory


# ---- the command


def run(capsys, *arguments):
    status = cli.main(["plan", *arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_the_command_prints_a_table(capsys):
    status, text, _ = run(capsys, "disks", "train.batch_size=128", "--gpus", "1", "64", "100", "--gpu", "a100-80")
    assert status == 0
    rows = [line.split() for line in text.splitlines() if line[:8].strip().isdecimal()]
    assert [row[:3] for row in rows] == [[str(n), str(stage), str(128 // n)] for n in (1, 64) for stage in range(4)]
    for part in (
        "0.51 M parameters",
        "score sweeps",
        "assumed: 45%",
        "80% of 2.039 TB/s",
        "a100-80",
        "128 images do not split over 100 GPUs",
    ):
        assert part in text


def test_the_command_prints_json(capsys):
    status, text, _ = run(capsys, "disks", "--gpus", "2", "--json", "--mfu", "0.5")
    found = json.loads(text)
    assert status == 0
    assert found["assumed"]["mfu"] == 0.5
    assert {(row["busy"], row["bound"]) for row in found["estimated"]} == {(None, "")}
    assert [row["stage"] for row in found["estimated"]] == [0, 1, 2, 3]
    memory = found["estimated"][1]["memory"]
    assert memory["gpu"] == pytest.approx(sum(size for kind, size in memory.items() if kind not in ("gpu", "host")))
    assert found["counted"]["networks"]["denoiser"]["parameters"] > 500_000


def test_neither_data_nor_weights_are_needed(capsys):
    """A denoiser of billions of parameters, of images that are not there."""
    wide = ["denoiser.channels=[2048,4096,4096]", "denoiser.groups=32", "data.path=not there"]
    status, text, _ = run(capsys, "images", *wide, "--gpus", "8", "--json")
    assert status == 0
    assert json.loads(text)["image_shape"] == [3, 64, 64]
    assert json.loads(text)["counted"]["networks"]["denoiser"]["parameters"] > 1e9


def test_arrays_that_are_not_there_need_a_shape(capsys):
    arguments = ["array", "data.path=not there", "--gpus", "1", "--json"]
    status, _, error = run(capsys, *arguments)
    assert status == 2
    assert error == "sami-fast: data.path: no file not there, and without it a plan needs data.image_size and data.channels\n"
    status, text, _ = run(capsys, *arguments[:2], "data.image_size=32", "data.channels=1", *arguments[2:])
    assert status == 0
    assert json.loads(text)["image_shape"] == [1, 32, 32]


def test_the_docs_show_what_the_command_prints(capsys):
    """After a change that is meant to alter it, docs/scaling.md needs all its tables anew."""
    text = (ROOT / "docs/scaling.md").read_text()
    assert "`sami-fast plan celeba64 data.path=celeba --gpus 8 64 512`" in text
    _, printed, _ = run(capsys, "celeba64", "data.path=celeba", "--gpus", "8", "64", "512")
    assert textwrap.indent(printed, "    ") in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["disks", "--collectives", "mpi"], "--collectives: expected one of nccl, gloo, found 'mpi'"),
        (["disks", "--gpu", "h1000"], "--gpu: expected one of a100-80, h100-sxm, h200, b200, found 'h1000'"),
        (["disks", "data.image_size=5"], "encoder, denoiser or data.image_size: image size 5 is below 8"),
        (["diskz"], "--config: no file diskz"),
    ],
)
def test_mistakes_get_one_sentence(arguments, sentence, capsys):
    status, out, error = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert error.startswith(f"sami-fast: {sentence}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpus", "0"], "expected a whole number from 1 to 100000, found '0'"),
        (["--gpus", "eight"], "found 'eight'"),
        (["--mfu", "2"], "expected a share above 0 and at most 1, found '2'"),
    ],
)
def test_bad_options(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", "disks", *arguments])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "overrides", "gpus", "bound"),
    [
        ("disks", [], 1, "host"),
        ("disks", ["engine.compile=step", "engine.cuda_graphs=true", "train.bank_steps=0"], 1, "kernels"),
        ("celeba64", ["data.path=celeba", "train.batch_size=64"], 1, "matmul"),
    ],
)
def test_what_bounds_a_step(name, overrides, gpus, bound, capsys):
    status, text, _ = run(capsys, name, *overrides, "--gpus", str(gpus))
    rows = [line.split() for line in text.splitlines() if line[:8].strip().isdecimal()]
    assert (status, rows[0][-1]) == (0, bound)
    assert f"  {bound}: {plan.BOUNDS[bound]}" in text


def test_an_unknown_gpu_from_python():
    with pytest.raises(UserError, match="--gpu: expected one of"):
        plan.plan(load_config(None, SMALL), [1], "tpu")
