"""How well codes recover known factors: every factor metric, on one set of codes, under one protocol."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from ..metrics.attributes import FOLDS, latent_quality, tad
from ..metrics.dci import dci, dci_from_importance
from ..metrics.identifiability import correlation_matrix, linear_r2, mcc, nonlinear_r2
from ..metrics.interventions import beta_vae_score, factor_vae_score
from ..metrics.irs import irs
from ..metrics.mig import discretize, mig, mig_ceiling
from ..metrics.modularity import explicitness, modularity
from ..metrics.sap import sap
from ..metrics.total_correlation import gaussian_total_correlation, mean_pairwise_mi
from .table import mean_of

TRAIN_SHARE = 2 / 3  # of the images, for metrics that learn on some and are scored on others: 10 000 of 15 000
CLASSES = 256  # a factor with at most as many whole-numbered values is taken as classes, any other is binned
CLASSIFIER_BINS = 10  # of a continuous factor, for classifiers, whose time grows with the classes; 20 elsewhere
DCI_VALUES, DCI_LEAST = 24_000, 1000  # code values that trees are grown on: more codes mean fewer images, but not fewer than these
STARTS = np.arange(12) * (np.pi / 24)  # of sines and cosines, a quarter turn: from there on they are the same two again
SMALLEST_SPLIT = 200  # images below which nothing is learnt from them


def factor_classes(factors: np.ndarray, bins: int = 20) -> np.ndarray:
    """Classes for the metrics that count: whole-numbered factors as they are, others in equal-width bins. [N, K] -> [N, K] ints."""
    whole = [(column == column.round()).all() and len(np.unique(column)) <= CLASSES for column in factors.T]
    return np.where(whole, factors, discretize(factors, bins)).astype(np.int64)


def targets(
    factors: np.ndarray, names: Sequence[str], periods: Mapping[str, float], codes: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What codes are compared with: the factors; of one that comes round again, such as a hue, its sine and its cosine. Where its own
    values begin is a convention that no code can know.

    Args:
        factors: [N, K].
        names: Of the factors.
        periods: Of those that come round again.
        codes: [N, D]; sines and cosines are counted from where two of these match them best, by rank correlation. From the factor's own
            beginning where None, for measures that are the same from anywhere.
    Returns:
        Columns [N, T], and the place of the factor that each belongs to, [T].
    """
    round_again = [place for place, name in enumerate(names) if name in periods]
    angles = {place: 2 * np.pi * factors[:, place] / periods[names[place]] for place in round_again}
    pairs = {place: [np.column_stack((np.sin(a + start), np.cos(a + start))) for start in STARTS] for place, a in angles.items()}
    best = dict.fromkeys(round_again, 0)
    if round_again and codes is not None:
        strength = correlation_matrix(codes, np.column_stack([pair for place in round_again for pair in pairs[place]]))
        matched = [each[linear_sum_assignment(-each)].sum() for each in strength.reshape(-1, 2, codes.shape[1])]
        best = dict(zip(round_again, np.reshape(matched, (-1, len(STARTS))).argmax(1), strict=True))
    own = [pairs[place][best[place]] if place in pairs else factors[:, [place]] for place in range(len(names))]
    return np.column_stack(own), np.repeat(np.arange(len(names)), [columns.shape[1] for columns in own])


def factor_correlations(codes: np.ndarray, factors: np.ndarray, names: Sequence[str], periods: Mapping[str, float]) -> np.ndarray:
    """|Rank correlation| of each factor with each code, [K, D]: the larger one of two targets. Arguments as in `targets`."""
    columns, owners = targets(factors, names, periods, codes)
    return np.maximum.reduceat(correlation_matrix(codes, columns), np.searchsorted(owners, np.arange(len(names))))


def by_factor(each: Iterable[float], owners: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """One number for each target, by factor: of one that has two, their mean. `owners` as `targets` gives them."""
    scores = np.array([*each])
    return {name: float(scores[owners == place].mean()) for place, name in enumerate(names)}


def linear_scores(codes: np.ndarray, factors: np.ndarray, names: tuple[str, ...], periods: dict[str, float]) -> dict[str, float]:
    """Linear R2 by factor; arguments as in `recovery_scores`."""
    columns, owners = targets(factors, names, periods)
    return by_factor(linear_r2(codes, columns), owners, names)


def matched_scores(codes: np.ndarray, factors: np.ndarray, names: Sequence[str], periods: Mapping[str, float]) -> dict[str, Any]:
    """MCC, of ranks and of values; arguments as in `recovery_scores`."""
    columns, owners = targets(factors, names, periods, codes)
    each, of_values = (by_factor(mcc(codes, columns, kind)[1], owners, names) for kind in ("spearman", "pearson"))
    return {"mcc": mean_of(each), "mcc_per_factor": each, "mcc_pearson": mean_of(of_values)}


def recovery_scores(codes: np.ndarray, factors: np.ndarray, names: tuple[str, ...], periods: dict[str, float]) -> dict[str, Any]:
    """The quick ones: linear R2, MCC, MIG, SAP, modularity and what depends on no classifier.

    Args:
        codes: [N, D].
        factors: [N, K], each varying.
        names: Of the factors.
        periods: Of those that come round again.
    """
    classes = factor_classes(factors)
    scores: dict[str, Any] = {"linear_r2": linear_scores(codes, factors, names, periods), **matched_scores(codes, factors, names, periods)}
    scores["mig"], per_factor = mig(codes, classes)
    scores["mig_per_factor"] = dict(zip(names, per_factor.tolist(), strict=True))
    columns, owners = targets(factors, names, periods, codes)
    scores["sap"] = mean_of(by_factor(sap(codes, columns)[1], owners, names))
    if len(names) > 1:
        scores["modularity"] = modularity(codes, classes)[0]
    return scores


def learned_scores(
    codes: np.ndarray,
    live: np.ndarray,
    factors: np.ndarray,
    names: tuple[str, ...],
    periods: dict[str, float],
    *,
    seed: int,
    jobs: int = 1,
) -> dict[str, Any]:
    """The slower ones, which draw interventions or learn on the first two thirds of the images and are scored on the rest.

    Args:
        codes: [N, D].
        live: Codes that trees are grown on, for time: the dead ones hold nothing. [L] indices.
        factors, names, periods: As in `recovery_scores`.
        seed: Of all draws.
        jobs: Processes for the trees.
    Returns:
        None where a metric is not defined, for lack of codes, factors or images.
    """
    classes, coarse, train = factor_classes(factors), factor_classes(factors, CLASSIFIER_BINS), int(len(codes) * TRAIN_SHARE)
    several = len(names) > 1
    enough = train >= SMALLEST_SPLIT and all(len(np.unique(part)) > 1 for half in (coarse[:train], coarse[train:]) for part in half.T)
    scores: dict[str, Any] = dict.fromkeys(
        ("nonlinear_r2", "explicitness", "factor_vae", "beta_vae", "irs", "dci_d", "dci_c", "dci_i", "dci_images")
    )
    if enough:
        columns, owners = targets(factors, names, periods)
        scores["nonlinear_r2"] = by_factor(nonlinear_r2(codes, columns, seed=seed), owners, names)
        scores["explicitness"] = explicitness(codes[:train], coarse[:train], codes[train:], coarse[train:])[0]
    scores["irs"] = irs(codes, classes)[0]
    if several:
        scores["factor_vae"], scores["factor_vae_pruned_dims"] = factor_vae_score(codes, classes, seed=seed)
        scores["beta_vae"] = beta_vae_score(codes, classes, seed=seed)
    if several and enough and len(live) > 1:
        used, test = codes[:, live], slice(train, None)
        grown = min(train, max(DCI_LEAST, DCI_VALUES // len(live)))
        result = dci(used[:grown], coarse[:grown], used[test], coarse[test], seed=seed, jobs=jobs)
        importance = np.zeros((codes.shape[1], len(names)))  # completeness is relative to the number of all codes
        importance[live] = result.importance
        disentanglement, completeness = dci_from_importance(importance)
        scores |= {"dci_d": disentanglement, "dci_c": completeness, "dci_i": result.informativeness, "dci_images": grown}
    return scores


def attribute_scores(codes: np.ndarray, attributes: np.ndarray, *, seed: int) -> dict[str, Any]:
    """TAD under both published protocols and the mean AUROC of linear probes, of binary attributes.

    Args:
        codes: [N, D].
        attributes: [N, M] of 0 and 1; one with fewer than five rows of either value is left out.
        seed: Of the folds.
    """
    rarer = np.minimum(attributes.sum(0), len(attributes) - attributes.sum(0))
    attributes = attributes[:, rarer >= FOLDS]
    scores: dict[str, Any] = {"attributes_scored": attributes.shape[1]}
    if not attributes.shape[1]:
        return scores
    for protocol in ("nashae", "infodiffusion"):
        result = tad(codes, attributes, protocol=protocol)
        scores |= {f"tad_{protocol}": result.score, f"attributes_captured_{protocol}": result.count}
    scores["latent_quality"] = latent_quality(codes, attributes, seed=seed)[0]
    return scores


def dependence_scores(codes: np.ndarray) -> dict[str, float]:
    """What the codes share among each other, without factors. [N, D], D >= 2, none constant."""
    return {"total_correlation": gaussian_total_correlation(codes), "mean_pairwise_mi": mean_pairwise_mi(codes)}


def ceiling(factors: np.ndarray) -> float:
    """The MIG of the factors themselves."""
    return mig_ceiling(factors, factor_classes(factors))
