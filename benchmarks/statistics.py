"""Tests of paired differences: bootstrap interval of their mean, Wilcoxon signed-rank test, Holm's correction."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from boneage_hf.errors import InputError

#: Numbers that one block of bootstrap samples may hold.
_BLOCK_ELEMENTS = 4_000_000


@dataclass(frozen=True)
class PairedDifference:
    """Mean of `a - b` over n pairs and its 95 % percentile interval (Efron & Tibshirani 1993, chapter 13)."""

    difference: float
    low: float
    high: float
    n: int


def paired_bootstrap(a: ArrayLike, b: ArrayLike, *, draws: int = 2000, seed: int = 0) -> PairedDifference:
    """Mean of `a - b` with an interval from resampling the pairs.

    Args:
        a, b: (n,) finite, paired.
        draws: bootstrap samples.
        seed: of their generator; the same seed and n draw the same samples.

    Raises:
        InputError: the two do not pair, are empty or hold NaN, or there is no draw.
    """
    differences = _differences(a, b)
    if draws < 1:
        raise InputError(f"The number of bootstrap draws must be 1 or more, not {draws}.")
    n = len(differences)
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK_ELEMENTS // n)
    means = [
        differences[generator.integers(0, n, size=(min(block, draws - start), n))].mean(axis=1)
        for start in range(0, draws, block)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return PairedDifference(float(differences.mean()), float(low), float(high), n)


def wilcoxon(a: ArrayLike, b: ArrayLike) -> float:
    """Two-sided p of the Wilcoxon signed-rank test; equal pairs are dropped (Wilcoxon 1945), 1 where all are equal.

    Args:
        a, b: (n,) finite, paired.

    Raises:
        InputError: as [`paired_bootstrap`].
    """
    from scipy import stats

    differences = _differences(a, b)
    return float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number, in the given order (Holm 1979): step-down, never falling, at most 1."""
    order = np.argsort(p_values, kind="stable")
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = largest
    return corrected


def _differences(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or not len(first):
        raise InputError(f"Paired numbers must be two rows of one length, not {first.shape} and {second.shape}.")
    differences: NDArray[np.float64] = first - second
    if not np.isfinite(differences).all():
        raise InputError("Paired numbers must be finite; find out why some are NaN or infinite.")
    return differences
