"""Binary attributes, such as those of CelebA, in single codes: AUROC and the total AUROC difference, TAD (NashAE, Yeats et al., ECCV 2022).

AUROC is exact here. Some published code sums 101 thresholds instead, which reads 0.009 too high at d' = 1 and more on heavy tails.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import entr
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from .checks import as_table, as_tables

PROTOCOLS = ("nashae", "infodiffusion")
CAPTURED_AUROC, MAX_REDUNDANCY = 0.75, 0.2
MIN_RANGE = 0.2  # a code that spans no more is dead to NashAE
FOLDS = 5


@dataclass(frozen=True)
class TAD:
    """Total AUROC difference and what it is made of; the arrays are of all rows under either protocol."""

    score: float  # a sum over captured attributes of at most 0.5 each, not a mean
    count: float  # attributes captured; under "infodiffusion" a mean over folds
    std: float | None  # over folds, which share three rows in four: not the spread over seeds. None under "nashae"
    captured: np.ndarray  # [M] bool
    auroc: np.ndarray  # [M, D] in [0.5, 1], either direction; 0.5 for a dead code
    redundancy: np.ndarray  # [M] in [0, 1]


def auroc_matrix(codes: np.ndarray, attributes: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of every attribute by every code, from rank sums; ties count half.

    Args:
        codes: [N, D].
        attributes: [N, M] of 0 and 1.
    Returns:
        [M, D] in [0, 1], above 0.5 where a code is larger with the attribute; 0.5 for a constant code or attribute.
    Raises:
        ValueError: lengths differ, wrong rank, values that are not finite, or an attribute with other values than 0 and 1.
    """
    codes, attributes = _as_codes_and_attributes(codes, attributes)
    with_it = attributes.sum(0)[:, None]
    pairs = with_it * (len(attributes) - with_it)
    won = attributes.T @ rankdata(codes, axis=0) - with_it * (with_it + 1) / 2
    return np.divide(won, pairs, out=np.full_like(won, 0.5), where=pairs > 0)


def redundancy(attributes: np.ndarray) -> np.ndarray:
    """The share of an attribute's entropy that the one other attribute tells which tells most.

        max_{j != i} I(y_i; y_j) / H(y_i)

    Args:
        attributes: [N, M] of 0 and 1.
    Returns:
        [M] in [0, 1]; 0 for a constant or a single attribute.
    Raises:
        ValueError: wrong rank, or values other than 0 and 1.
    """
    attributes = _as_attributes(attributes)
    with_it, both = attributes.sum(0), attributes.T @ attributes
    cells = np.stack((both, with_it[:, None] - both, with_it - both, len(attributes) - with_it[:, None] - with_it + both))
    joint = entr(cells / len(attributes)).sum(0)  # H(y_i, y_j); on the diagonal H(y_i)
    entropy = joint.diagonal()
    information = (entropy[:, None] + entropy - joint).clip(min=0.0)
    np.fill_diagonal(information, 0.0)
    return np.divide(information.max(1), entropy, out=np.zeros_like(entropy), where=entropy > 0)


def tad(codes: np.ndarray, attributes: np.ndarray, *, protocol: str = "nashae", min_std: float = 0.0) -> TAD:
    """Total AUROC difference: how far the best code of an attribute is ahead of the second, summed over the captured attributes.

    An attribute is captured if some code has AUROC >= 0.75 for it, in either direction, and no other attribute tells more than 0.2 of
    its entropy. Both protocols of published tables, but for the images, which are the caller's choice, and with exact AUROC:

        "nashae"         all rows at once; a code whose range is at most 0.2 is dead. Sees the scale of the codes and the number of rows
        "infodiffusion"  mean and standard deviation over five shuffled folds, scored on the four fifths that a fold leaves; no code is
                         dead. Standardising the codes, which that protocol also does, changes no AUROC

    Args:
        codes: [N, D], N of 10 000 or more; a single code has a runner-up of 0.5.
        attributes: [N, M] of 0 and 1.
        protocol: "nashae" or "infodiffusion".
        min_std: Codes with a smaller standard deviation count as dead under either protocol. Same unit as the codes.
    Raises:
        ValueError: another protocol, lengths differ, wrong rank, values that are not finite, an attribute with other values than 0 and 1,
            or fewer rows than folds.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol: expected {' or '.join(PROTOCOLS)}, found {protocol!r}")
    codes, attributes = _as_codes_and_attributes(codes, attributes)
    dead = codes.std(0) < min_std
    if protocol == "nashae":
        dead |= np.ptp(codes, axis=0) <= MIN_RANGE

    def on(rows: np.ndarray) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
        directed = auroc_matrix(codes[rows], attributes[rows])
        auroc = np.where(dead, 0.5, np.maximum(directed, 1.0 - directed))
        told = redundancy(attributes[rows])
        best = np.sort(np.column_stack((auroc, np.full(len(auroc), 0.5))), axis=1)[:, ::-1]
        captured = (best[:, 0] >= CAPTURED_AUROC) & (told <= MAX_REDUNDANCY)
        return float((best[:, 0] - best[:, 1])[captured].sum()), captured, auroc, told

    score, *whole = on(np.arange(len(codes)))
    if protocol == "nashae":
        return TAD(score, float(whole[0].sum()), None, *whole)
    if len(codes) < FOLDS:
        raise ValueError(f"codes: expected at least {FOLDS} rows, one per fold, found {len(codes)}")
    folds = [on(rows) for rows, _ in KFold(FOLDS, shuffle=True, random_state=0).split(codes)]
    scores, counts = [fold[0] for fold in folds], [fold[1].sum() for fold in folds]
    return TAD(float(np.mean(scores)), float(np.mean(counts)), float(np.std(scores)), *whole)


def latent_quality(codes: np.ndarray, attributes: np.ndarray, seed: int = 0) -> tuple[float, np.ndarray]:
    """How well all codes together tell the attributes: AUROC of a logistic regression on held-out rows, mean over five folds.

    Args:
        codes: [N, D]; standardised by the rows a fold fits on.
        attributes: [N, M] of 0 and 1, with at least five rows of either.
        seed: Of the folds, which have the same share of each attribute.
    Returns:
        The mean over attributes, and the AUROC of each; chance 0.5. [M].
    Raises:
        ValueError: lengths differ, wrong rank, values that are not finite, an attribute with other values than 0 and 1, or with too few
            rows of either.
    """
    codes, attributes = _as_codes_and_attributes(codes, attributes)
    rarer = np.minimum(attributes.sum(0), len(attributes) - attributes.sum(0))
    if rarer.min() < FOLDS:
        raise ValueError(
            f"attributes: expected at least {FOLDS} rows of either value, found {rarer.min():g} in column {rarer.argmin()}; drop it"
        )
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    aurocs = np.array([cross_val_score(model, codes, y, cv=folds, scoring="roc_auc").mean() for y in attributes.T])
    return float(aurocs.mean()), aurocs


def _as_codes_and_attributes(codes: np.ndarray, attributes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes, attributes = as_tables(codes=codes, attributes=attributes)
    return codes, _as_attributes(attributes)


def _as_attributes(attributes: np.ndarray) -> np.ndarray:
    attributes = as_table("attributes", attributes)
    if not np.isin(attributes, (0, 1)).all():
        raise ValueError("attributes: expected 0 and 1 only, found other values; labels of -1 and 1 become so by > 0")
    return attributes
