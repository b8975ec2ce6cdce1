"""The table of claims: what it takes for one to hold, and that it says what does not."""

import pytest

from benchmarks import claims


@pytest.fixture(autouse=True)
def few_seeds(monkeypatch):
    monkeypatch.setattr(claims, "COMPARED", {"rooms": 2, "stills": 1})


@pytest.fixture
def rows(monkeypatch):
    """Rows in place of the committed ones: a list to fill."""
    kept: list[dict] = []

    def committed(name, **fields):
        found = [row for row in kept if row["file"] == name and all(row.get(key) == value for key, value in fields.items())]
        if not found:
            raise ValueError(name)
        return found

    monkeypatch.setattr(claims, "committed", committed)
    return kept


@pytest.mark.parametrize(
    ("ours", "theirs", "holds"),
    [
        ([0.9, 0.8], [0.5, 0.5], True),
        ([0.9, 0.8], [0.8, 0.82], False),  # by 0.04; ours spread by 0.07
        ([0.9, 0.9], [0.3, 0.9], False),  # theirs spread by 0.42
        ([0.9], [0.1], False),  # one seed says nothing of the spread
        ([0.9, 0.9], [0.1], False),
    ],
)
def test_ahead_by_more_than_the_spread_over_seeds(ours, theirs, holds):
    assert claims.ahead(ours, theirs) is holds


def test_a_lead_needs_every_rival(rows):
    where = {"file": "methods.jsonl", "data": "rooms", "settings": "", "straightness": {}}
    found = {"sami": (0.8, 0.82), "beta_vae": (0.5, 0.52), "beta_vae_falling": (0.4, 0.42), "diffae": (0.3, 0.32)}
    for method, scores in found.items():
        for seed, score in enumerate(scores):
            rows.append(where | {"method": method, "seed": seed, "mcc": score, "baselines": {"pca": {"mcc": 0.3 + 0.1 * seed}}})
    judged = claims.leads("rooms", "mcc", [*claims.RIVALS, "pca"])
    told = "sami 0.810 ± 0.014, pca 0.350 ± 0.071, beta-VAE 0.510 ± 0.014, "  # of components two seeds, not eight
    told += "beta-VAE with falling beta 0.410 ± 0.014, DiffAE 0.310 ± 0.014"
    assert judged() == (True, told)
    assert not claims.leads("rooms", "mcc", ["beta_vae", "pixels"])()[0]
    rows[:] = [row for row in rows if row["method"] != "beta_vae_falling" and (row["method"], row["seed"]) != ("diffae", 1)]
    holds, told = judged()
    assert not holds
    assert told.endswith("DiffAE 0.300; seeds missing: beta-VAE with falling beta has 0 of 2, DiffAE has 1 of 2")
    rows[:] = [rows[0] | {"method": method} for method in found]
    assert judged()[1].endswith("; seeds missing: there are 1 of 2")


def clip_row(method: str, curvature: float, more: dict | None = None) -> dict:
    def scores(value: float) -> dict:
        return {"curvature": value, "curvature_low": value - 2, "curvature_high": value + 2}

    codes = {"latents": scores(curvature), **{name: scores(value) for name, value in (more or {}).items()}}
    where = {"file": "methods.jsonl", "data": "stills", "settings": "", "seed": 0}
    return {**where, "method": method, "straightness_by_source": {"carphone": codes}}


@pytest.mark.parametrize(
    ("curvatures", "pixels", "holds"),
    [
        ({"sami": 40, "beta_vae": 50, "beta_vae_falling": 43, "diffae": 60}, 70, True),
        ({"sami": 40, "beta_vae": 43, "beta_vae_falling": 43, "diffae": 60}, 70, False),  # apart from one trained rival only
        ({"sami": 40, "beta_vae": 50, "beta_vae_falling": 50, "diffae": 60}, 43, False),  # not from pixels
        ({"sami": 40, "beta_vae": 50, "diffae": 60}, 70, False),  # one was not trained
        ({"sami": 40, "beta_vae": 30, "beta_vae_falling": 50, "diffae": 60}, 70, False),  # not the least
    ],
)
def test_straightest_needs_intervals_apart(rows, curvatures, pixels, holds):
    beside = {"pixels": pixels, "pca": 50, "untrained": 60, "imagenet": 90}
    rows += [clip_row(name, value, beside if name == "sami" else None) for name, value in curvatures.items()]
    rows += [clip_row(name, 1.0) | {"seed": 1} for name in ("sami", "beta_vae")]  # beyond those that are compared
    assert claims.straightest("stills", "carphone")()[0] is holds


def test_axes_are_judged_on_runs_that_have_some(rows):
    where = {"file": "methods.jsonl", "data": "rooms", "settings": "", "method": "sami"}
    rows += [where | {"seed": seed, "mcc": 0.4, "mcc_axes": {"ica": 0.5, "pca": 0.3}} for seed in range(2)]
    judged = claims.found_axes("rooms", "mcc_axes", "mcc")
    assert judged() == (True, "as they are 0.400 ± 0.000, ica 0.500 ± 0.000, pca 0.300 ± 0.000")
    rows[1]["mcc_axes"] = {}  # a single latent lives
    assert judged() == (False, "as they are 0.400, ica 0.500, pca 0.300; seeds missing: sami has 1 of 2")
    rows.append(rows[0] | {"method": "diffae", "mcc_axes": {"ica": 0.7, "pca": 0.2}})
    assert judged()[1] == "as they are 0.400, ica 0.500, pca 0.300; DiffAE at its best, ica, 0.700; seeds missing: sami has 1 of 2"


def test_health_is_asked_of_five_seeds(rows):
    def run(seed: int, word: str = "healthy", latents: int = 8) -> dict:
        where = {"file": "methods.jsonl", "data": "faces", "settings": "", "method": "sami", "seed": seed}
        return where | {"health": {"word": word}, "information_per_dim": [1.2] * latents + [0.4] * 4}

    judged = claims.all_healthy("faces", 8, 1.0)
    rows += [run(seed) for seed in range(4)]
    assert not judged()[0]
    rows.append(run(4))
    assert judged() == (True, "healthy, healthy, healthy, healthy, healthy; 8, 8, 8, 8, 8 latents of 1 nats")
    rows[-1] = run(4, latents=7)
    assert not judged()[0]
    rows[-1] = run(4, word="redundant")
    assert not judged()[0]


def test_what_does_not_hold_comes_first_and_what_was_not_measured_says_so(rows):
    where = {"file": "recovery.jsonl", "settings": "", "linear_r2": {"x": 0.98}, "mcc": 0.99}
    rows += [where | {"config": "disks", "passes": True}] * 10
    rows += [where | {"config": "disks32", "passes": True, "cpu_seconds": 400 + 41 * max(0, seed - 6)} for seed in range(10)]
    lines = claims.generated("").splitlines()[2:]
    assert len(lines) == len(claims.CLAIMS)
    assert lines[0].startswith("| disks 32x32")
    assert lines[0].endswith("8 of 10 seeds; least R2 0.980, least MCC 0.990; 8.7 CPU minutes at most | **no** |")
    assert lines[1].endswith("|  | not measured |")
    del rows[-1]["cpu_seconds"]
    (line,) = [line for line in claims.generated("").splitlines() if line.startswith("| disks 32x32")]
    assert line.endswith(
        "9 of 10 seeds; least R2 0.980, least MCC 0.990; 8.0 CPU minutes at most; CPU minutes of 1 seeds not measured | **no** |"
    )
    assert lines[-1].startswith("| disks 16x16")
    assert lines[-1].endswith("| yes |")
