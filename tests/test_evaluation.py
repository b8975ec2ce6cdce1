"""Scores of whole runs: what `sami-fast evaluate` computes, averages and prints, and what it says when it cannot."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from sami_fast.cli import main
from sami_fast.config import load_config
from sami_fast.data import Dataset, ImageFolder
from sami_fast.errors import UserError
from sami_fast.evaluation import evaluate, known_factors, open_run, tables
from sami_fast.evaluation.factors import (
    DCI_LEAST,
    attribute_scores,
    factor_classes,
    factor_correlations,
    learned_scores,
    recovery_scores,
)
from sami_fast.evaluation.run import places, readable
from sami_fast.evaluation.scores import plain
from sami_fast.evaluation.table import spread
from sami_fast.metrics.attributes import tad
from sami_fast.metrics.identifiability import linear_r2
from sami_fast.train import train

METHODS = {"sami": [], "beta_vae": ["method=beta_vae"], "diffae": ["method=diffae"]}


def tiny_run(runs, name, *changes):
    return train(load_config("tests/tiny.yaml", [f"runs_dir={runs}", f"name={name}", "report.images=300", *changes]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of each method on disks."""
    folder = tmp_path_factory.mktemp("runs")
    for method, changes in METHODS.items():
        for seed in (0, 1):
            tiny_run(folder, f"{method}_{seed}", f"seed={seed}", *changes)
    return folder


@pytest.fixture(scope="module")
def evaluated(runs):
    return {f"{method}_{seed}": evaluate(runs / f"{method}_{seed}", baselines=method == "sami") for method in METHODS for seed in (0, 1)}


# Scores of factors


def uniform(count, columns, seed=0):
    return np.random.default_rng(seed).random((count, columns))


def test_factor_classes_takes_whole_numbers_as_they_are_and_bins_the_rest():
    factors = np.column_stack((np.arange(1000) % 7, np.arange(1000) / 1000, np.arange(1000)))
    classes = factor_classes(factors)
    assert (classes[:, 0] == factors[:, 0]).all()
    assert len(np.unique(classes[:, 1])) == 20
    assert len(np.unique(classes[:, 2])) == 20  # too many values to be classes
    assert len(np.unique(factor_classes(factors, 10)[:, 1])) == 10


def test_a_circular_factor_is_scored_by_sine_and_cosine():
    turn = uniform(2000, 1)[:, 0]
    codes = np.column_stack((np.sin(2 * np.pi * turn), np.cos(2 * np.pi * turn)))
    plain = recovery_scores(codes, turn[:, None], ("rotation",), {})["linear_r2"]["rotation"]
    circular = recovery_scores(codes, turn[:, None], ("rotation",), {"rotation": 1.0})["linear_r2"]["rotation"]
    assert circular == pytest.approx(1.0)
    assert plain < 0.7
    assert plain == pytest.approx(linear_r2(codes, turn[:, None])[0])


def test_where_a_circular_factor_begins_does_not_matter():
    """A hue is the same hue wherever red is said to begin; its own values, and a rank correlation with them, are not."""
    generator = np.random.default_rng(0)
    turn, size = generator.uniform(size=(2, 2000))
    codes = np.column_stack((np.sin(2 * np.pi * turn), np.cos(2 * np.pi * turn), size))
    names, periods = ("hue", "size"), {"hue": 1.0}
    for begins in (0.0, 0.125, 0.25, 0.5, 0.7):
        factors = np.column_stack(((turn + begins) % 1.0, size))
        found = recovery_scores(codes, factors, names, periods)
        near = 0.0 if begins < 0.7 else 2e-3  # 0.7 lies between two of the places that are tried
        assert found["mcc_per_factor"] == pytest.approx({"hue": 1.0, "size": 1.0}, abs=near or None)
        assert (found["mcc"], found["mcc_pearson"]) == pytest.approx((1.0, 1.0), abs=near or None)
        assert found["sap"] > 0.98
        strength = factor_correlations(codes, factors, names, periods)
        assert strength == pytest.approx(np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), abs=0.06)
        taken_as_it_is = recovery_scores(codes, factors, names, {})
        assert taken_as_it_is["mcc"] < 0.9


def test_a_perfect_code_scores_perfectly_everywhere():
    factors = uniform(1500, 3)
    codes = factors * [1.0, -20.0, 300.0]
    quick = recovery_scores(codes, factors, ("a", "b", "c"), {})
    assert quick["mcc"] == pytest.approx(1.0)
    assert quick["mig"] > 0.95
    assert quick["sap"] > 0.99
    learned = learned_scores(codes / codes.std(0), np.arange(3), factors, ("a", "b", "c"), {}, seed=0)
    assert learned["factor_vae"] == learned["beta_vae"] == 1.0
    assert learned["dci_d"] > 0.97
    assert learned["dci_images"] == DCI_LEAST
    assert learned["explicitness"] > 0.98  # values next to the border of two bins are told apart by too little
    assert min(learned["nonlinear_r2"].values()) > 0.99


def test_what_is_not_defined_is_none():
    one = learned_scores(uniform(300, 2), np.array([0]), uniform(300, 1, 1), ("a",), {}, seed=0)
    assert one["factor_vae"] is one["dci_d"] is None
    assert one["explicitness"] is not None
    few = learned_scores(uniform(40, 2), np.arange(2), uniform(40, 2, 1), ("a", "b"), {}, seed=0)
    assert few["dci_d"] is few["nonlinear_r2"] is None
    assert few["factor_vae"] is not None


def test_attributes_are_scored_under_both_protocols():
    attributes = (uniform(1000, 4) < 0.4).astype(float)
    codes = attributes + 0.01 * np.random.default_rng(1).standard_normal(attributes.shape)
    scores = attribute_scores(codes, attributes, seed=0)
    assert scores["tad_nashae"] == tad(codes, attributes, protocol="nashae").score
    assert scores["attributes_captured_infodiffusion"] == 4
    assert scores["latent_quality"] > 0.99


# Runs


def test_every_method_is_scored(evaluated):
    sami, vae, diffae = (evaluated[f"{method}_0"].scores for method in METHODS)
    shared = {
        "linear_r2",
        "mcc",
        "mig",
        "mig_ceiling",
        "sap",
        "modularity",
        "dci_d",
        "factor_vae",
        "irs",
        "active_dims",
        "kl_nats",
        "method",
    }
    for scores in (sami, vae, diffae):
        assert shared <= scores.keys()
    assert sami["kl_nats"] == pytest.approx(sum(sami["kl_per_dim"]))
    assert diffae["kl_nats"] is diffae["kl_per_dim"] is None
    assert "elbo_nats" not in diffae
    for scores in (sami, vae):
        terms = ("diffusion_nats", "kl_nats", "prior_nats", "reconstruction_nats")
        assert scores["elbo_nats"] == pytest.approx(sum(scores[term] for term in terms), rel=1e-5)
        assert len(scores["information_nats"]) == 4
        assert len(scores["information_nats"][0]) == len(scores["logsnr_levels"]) == 15
    assert vae["diffusion_nats"] == vae["prior_nats"] == 0.0


@pytest.mark.parametrize("method", ["beta_vae", "diffae"])
def test_baselines_are_the_same_whatever_was_trained(runs, evaluated, method):
    there = evaluated["sami_0"].baselines
    assert set(there) == {"untrained", "pca", "pixels"}
    other = evaluate(runs / f"{method}_0").baselines
    assert other["pca"] == there["pca"]
    assert other["pixels"] == there["pixels"]
    assert other["untrained"]["linear_r2"] == pytest.approx(there["untrained"]["linear_r2"])


def test_numbers_are_json(evaluated):
    for run in evaluated.values():
        assert json.loads(json.dumps(run.scores, allow_nan=False)) == run.scores


def test_the_same_run_gives_the_same_scores(runs, evaluated):
    assert evaluate(runs / "sami_1", baselines=False).scores == evaluated["sami_1"].scores


def test_fewer_images_when_asked(runs):
    assert open_run(runs / "sami_0").count == 300
    assert open_run(runs / "sami_0", 64).count == 64
    assert evaluate(runs / "sami_0", images=64, baselines=False).scores["num_images"] == 64


def test_images_of_a_sorted_set_are_chosen_at_random():
    class Sorted(Dataset):
        size = 1000

    chosen = places(Sorted(), 100)
    assert len(set(chosen.tolist())) == 100
    assert chosen[:50].float().mean() == pytest.approx(500, abs=150)  # a prefix shows the whole set, and so does either half
    assert chosen[50:].float().mean() == pytest.approx(500, abs=150)
    assert torch.equal(chosen, places(Sorted(), 1000)[:100])
    Sorted.clip_length = 16  # frames of videos come in their order, from all of them
    assert places(Sorted(), 4).tolist() == [0, 333, 666, 999]
    Sorted.size = None
    assert places(Sorted(), 3).tolist() == [0, 1, 2]


def test_an_image_that_cannot_be_read_is_not_scored(tmp_path):
    """Nor does another one stand beside its factors."""
    for n in range(6):
        Image.fromarray(np.full((8, 8), 40 * n, np.uint8)).save(tmp_path / f"{n}.png")
    source = ImageFolder(str(tmp_path), image_size=8, holdout=0.0, max_bad=0.5, cache_dir=str(tmp_path / "cache"), cache_gib=0.0)
    (tmp_path / "2.png").write_bytes(b"broken")
    assert readable(source, torch.tensor([5, 2, 0])).tolist() == [5, 0]
    with pytest.raises(UserError, match=r"^data\.path: none of the 1 evaluation images can be read$"):
        readable(source, torch.tensor([2]))


def test_a_factor_that_one_half_does_not_show_is_left_out(evaluated, runs, monkeypatch):
    run = open_run(runs / "sami_0", 64)
    factors = torch.rand(64, 3)
    factors[32:, 1] = 0.5
    monkeypatch.setattr(type(run), "factors", lambda self: factors)
    assert known_factors(run)[1] == ("x", "background")


def test_rare_attributes_are_left_out():
    attributes = np.zeros((100, 3))
    attributes[:40, 0] = attributes[:4, 1] = 1.0
    codes = np.random.default_rng(0).standard_normal((100, 2))
    assert attribute_scores(codes, attributes, seed=0)["attributes_scored"] == 1
    assert attribute_scores(codes, attributes[:, 1:], seed=0) == {"attributes_scored": 0}


def test_completeness_is_relative_to_all_codes():
    factors = uniform(1500, 2)
    codes = np.column_stack((factors, factors[:, 0] + factors[:, 1], uniform(1500, 5, 1)))
    arguments = (factors, ("a", "b"), {})
    some, more = (learned_scores(codes[:, :width], np.arange(3), *arguments, seed=0) for width in (3, 8))
    assert more["dci_d"] == pytest.approx(some["dci_d"])
    assert 1 - more["dci_c"] == pytest.approx((1 - some["dci_c"]) * math.log(3) / math.log(8), abs=1e-6)


def test_plain_numbers():
    assert plain({"a": np.array([[1.0, np.nan]]), "b": math.inf, "c": [2], "d": None}) == {
        "a": [[1.0, None]],
        "b": None,
        "c": [2],
        "d": None,
    }


# Tables


def test_seeds_of_a_method_are_one_column(evaluated):
    text = tables(list(evaluated.values()))
    header = next(line for line in text.splitlines() if line.startswith("| "))
    assert [cell.strip() for cell in header.split("|")[2:-1]] == ["sami", "beta_vae", "diffae", "untrained encoder", "PCA", "pixels"]
    assert "Seeds: sami: 2, beta_vae: 2, diffae: 2." in text
    values = [evaluated[f"sami_{seed}"].scores["mcc"] for seed in (0, 1)]
    row = next(line for line in text.splitlines() if line.startswith("| MCC, rank"))
    assert row.split("|")[2].strip() == f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
    rate = next(line for line in text.splitlines() if line.startswith("| KL, nats"))
    assert rate.split("|")[4].strip() == ""  # a deterministic encoder has none


def test_two_settings_of_one_method_are_two_columns(evaluated):
    run = evaluated["sami_0"]
    other = dataclasses.replace(run, config=dataclasses.replace(run.config, name="wide", kl_weight=load_config().kl_weight))
    changed = dataclasses.replace(other.config.kl_weight, end=0.01)
    other = dataclasses.replace(other, config=dataclasses.replace(other.config, kl_weight=changed))
    header = next(line for line in tables([run, other]).splitlines() if line.startswith("| "))
    assert [cell.strip() for cell in header.split("|")[2:4]] == ["sami_0", "sami wide"]  # a name that has the method in it stands alone


def test_no_run_is_lost_to_another_of_its_name(evaluated):
    run = evaluated["sami_0"]
    changed = dataclasses.replace(run.config.kl_weight, end=0.01)
    other = dataclasses.replace(run, folder="elsewhere", config=dataclasses.replace(run.config, kl_weight=changed))
    header = next(line for line in tables([run, other]).splitlines() if line.startswith("| "))
    assert "sami elsewhere" in header
    assert f"sami {run.folder}" in header


def test_baselines_of_other_encoders_are_other_columns(evaluated):
    run = evaluated["sami_0"]
    wider = dataclasses.replace(run.config.encoder, latent_size=5)
    other = dataclasses.replace(run, config=dataclasses.replace(run.config, name="wide", encoder=wider))
    header = next(line for line in tables([run, other]).splitlines() if line.startswith("| "))
    assert "PCA (sami_0)" in header
    assert "PCA (wide)" in header


def test_live_axes_of_each_run_are_listed(evaluated):
    run = evaluated["sami_0"]
    text = tables(
        [dataclasses.replace(run, scores=run.scores | {"information_per_dim": [0.01, 0.2, 0.3, 0.0], "kl_per_dim": [9.0, 0.3, 0.4, 0.0]})]
    )
    rows = [line for line in text.splitlines() if line.startswith("| z")]
    assert [row.split("|")[1].strip() for row in rows] == ["z2", "z1"]


def test_other_data_is_another_table(evaluated):
    run = evaluated["sami_0"]
    elsewhere = dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, image_size=16))
    assert tables([run, dataclasses.replace(run, config=elsewhere)]).count("Data: disks") == 2


def test_spread():
    assert spread([1.0], 2) == "1.00"
    assert spread([1.0, 2.0, 3.0], 1) == "2.0 ± 1.0"
    assert spread([1.0, None], 1) == ""
    assert spread([], 1) == ""


# Clips


def test_straightness_of_sprites(tmp_path):
    folder = tiny_run(tmp_path, "sprites", "data.kind=sprites", "data.image_size=16", "data.video.clip_length=5", "report.images=64")
    run = evaluate(folder)
    assert set(run.straightness) == {"latents", "untrained", "pca", "pixels"}
    latents, pixels = run.straightness["latents"], run.straightness["pixels"]
    assert latents["frames"] == 5
    assert latents["clips"] == 256
    assert latents["delta_curvature"] == pytest.approx(latents["curvature"] - pixels["curvature"], abs=0.5)  # clips without motion aside
    assert pixels["delta_curvature"] == pytest.approx(0.0, abs=1e-9)
    assert latents["curvature_low"] < latents["curvature"] < latents["curvature_high"]
    assert math.isfinite(pixels["standardized_curvature"])
    assert "Straightness of 256 clips of 5 frames" in tables([run])
    assert "rotation" in run.scores["linear_r2"]


# The command


def test_the_command_prints_and_writes(runs, tmp_path, capsys):
    folders = [str(runs / f"{method}_0") for method in METHODS]
    output = tmp_path / "table.md"
    assert main(["evaluate", *folders, "--images", "64", "--jobs", "1", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert output.read_text().strip() in printed
    assert "| untrained encoder" in printed
    numbers = tmp_path / "numbers.json"
    assert main(["evaluate", folders[0], "--images", "64", "--no-baselines", "--output", str(numbers)]) == 0
    (row,) = json.loads(numbers.read_text())
    assert row["num_images"] == 64
    assert row["baselines"] == {}
    assert row["config"]["method"] == "sami"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere: not a run folder; expected config.yaml"),
        (["{run}", "--output", "{tmp}/table.txt"], "--output: expected a name ending in .md or .json"),
        (["{run}", "--output", "{tmp}/no/table.md"], "--output: no folder"),
    ],
)
def test_bad_input_gets_one_sentence(runs, tmp_path, capsys, arguments, sentence):
    filled = [argument.format(run=runs / "sami_0", tmp=tmp_path) for argument in arguments]
    assert main(["evaluate", *filled]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("sami-fast:") == 1


def test_pixels_and_components_are_noiseless_codes(evaluated):
    pca = evaluated["sami_0"].baselines["pca"]
    assert pca["kl_nats"] is None
    assert pca["linear_r2"] == pca["linear_r2_mu"]
