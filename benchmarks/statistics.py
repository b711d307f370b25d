"""Tests on the errors of systems: paired comparisons on the same images and their correction.

Errors are predicted - reference in months; every function takes signed or absolute errors and uses their size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike, NDArray

from boneage_hf.errors import InputError
from boneage_hf.metrics import ALPHA
from boneage_hf.metrics import bland_altman as bland_altman  # taken from here by what draws it

#: The power for which a sample size is given: the usual convention.
POWER = 0.8

#: A 95th percentile of fewer values is hardly more than the largest of them, and is not given.
ENOUGH_FOR_P95 = 20

# Elements of one (draws, images) block: 2 million indices are 16 MB.
_BLOCK_ELEMENTS = 2_000_000


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """A difference of two MAEs on the same images, MAE of a - MAE of b, months, with its 95 % bootstrap interval."""

    n: int
    difference_months: float
    low_months: float
    high_months: float


def paired_bootstrap(a: ArrayLike, b: ArrayLike, *, draws: int = 2000, seed: int = 0) -> PairedDifference:
    """Bootstrap the difference of two MAEs over images, both errors of an image drawn together.

    Args:
        a, b: shape (n,), errors in months on the same images in the same order.
        draws: samples of n images with replacement (Efron's percentile method).
        seed: of the draws.

    Raises:
        InputError: lengths differ, a side is empty, or a value is not finite; draws below 1.
    """
    first, second = _paired(a, b)
    _at_least_one(draws, "draws")
    gained = first - second
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK_ELEMENTS // len(gained))
    means = [
        gained[generator.integers(0, len(gained), size=(min(block, draws - start), len(gained)))].mean(axis=1)
        for start in range(0, draws, block)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return PairedDifference(
        n=len(gained), difference_months=float(gained.mean()), low_months=float(low), high_months=float(high)
    )


def wilcoxon(a: ArrayLike, b: ArrayLike) -> float:
    """Two-sided p-value of the Wilcoxon signed-rank test on paired absolute errors (`scipy.stats.wilcoxon`).

    Images on which both err equally are left out, as in Wilcoxon's own method; if that leaves none, the p-value is 1.

    Args:
        a, b: shape (n,), errors in months on the same images in the same order.

    Raises:
        InputError: as `paired_bootstrap`.
    """
    first, second = _paired(a, b)
    # 3.2 - 3.1 and 1.2 - 1.1 are one rank: without rounding the last bit decides.
    gained = np.round(first - second, 9)
    if not gained.any():
        return 1.0
    return float(scipy.stats.wilcoxon(gained, zero_method="wilcox", alternative="two-sided").pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number, in the given order (Holm S, Scand J Statist 1979;6:65-70).

    Raises:
        InputError: a value is not between 0 and 1.
    """
    values = np.asarray(p_values, dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise InputError("a p-value is not between 0 and 1; leave out tests that could not be made.")
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in adjusted]


def n_needed(a: ArrayLike, b: ArrayLike, *, alpha: float = ALPHA, power: float = POWER) -> int | None:
    """Number of images at which the observed difference of two MAEs would be found with this power.

    n = ((z(1 - alpha/2) + z(power)) * SD / mean)^2, rounded up, over the paired differences of absolute errors (Chow
    S-C, Shao J, Wang H: Sample Size Calculations in Clinical Research, 2nd ed., 2008, section 3.1, one-sample design,
    test for equality, which is the paired one on differences). It takes the observed mean and SD for the true
    ones and one comparison; with many, give the alpha that is left for one.

    Args:
        a, b: shape (n,), errors in months on the same images in the same order; n of 2 or more.

    Returns:
        At least 2; None where no difference was observed or a single image leaves its SD unknown.

    Raises:
        InputError: as `paired_bootstrap`; or alpha or power is not between 0 and 1.
    """
    first, second = _paired(a, b)
    if not (0 < alpha < 1 and 0 < power < 1):
        raise InputError(f"alpha is {alpha} and power {power}; both lie between 0 and 1.")
    gained = first - second
    mean = float(gained.mean())
    if len(gained) < 2 or math.isclose(mean, 0, abs_tol=1e-9):
        return None
    z = scipy.stats.norm.ppf(1 - alpha / 2) + scipy.stats.norm.ppf(power)
    return max(2, math.ceil((z * float(gained.std(ddof=1)) / mean) ** 2))


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = _sizes(a, "first errors"), _sizes(b, "second errors")
    if len(first) != len(second):
        raise InputError(
            f"there are {len(first)} errors on one side and {len(second)} on the other; compare on the same images."
        )
    return first, second


def _sizes(errors: ArrayLike, name: str) -> NDArray[np.float64]:
    column = np.asarray(errors, dtype=np.float64)
    if column.ndim != 1 or not len(column):
        raise InputError(f"the {name} have shape {column.shape}; give one number per image, at least one.")
    if not np.isfinite(column).all():
        raise InputError(f"some of the {name} are NaN or infinite; take those images out of both sides and say so.")
    return np.abs(column)


def _at_least_one(value: int, name: str) -> None:
    if value < 1:
        raise InputError(f"{name} is {value}; it must be 1 or more.")
