"""Predictions against references as pictures: scatter, Bland-Altman, error by age.

A point is one image: these pictures belong beside `table.csv`, on the user's disk.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .sex import SEXES
from .splits import age_band, age_band_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Okabe and Ito's blue and vermilion: told apart by colour-blind readers and in grey print, with different markers.
_COLOURS = {"female": "#D55E00", "male": "#0072B2"}
_MARKERS = {"female": "o", "male": "^"}

#: Bland and Altman, Lancet 1986;327:307: limits of agreement are the mean difference -+ 1.96 SD.
LIMITS_SD = 1.96


def limits_of_agreement(predicted: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """Lower limit, bias and upper limit of `predicted - reference` (n,), months; SD with n - 1."""
    errors = np.asarray(predicted, float) - np.asarray(reference, float)
    bias, spread = float(errors.mean()), LIMITS_SD * float(errors.std(ddof=1)) if len(errors) > 1 else float("nan")
    return bias - spread, bias, bias + spread


def draw_evaluation(table: pd.DataFrame, folder: Path, *, title: str) -> list[Path]:
    """Write `scatter.png`, `bland_altman.png` and `error_by_age.png` into an existing folder.

    Args:
        table: columns `predicted_months`, `reference_months`, `sex`.
        title: printed above each picture: model, revision, protocol.
    """
    drawings = {"scatter": _scatter, "bland_altman": _bland_altman, "error_by_age": _error_by_age}
    return [_save(draw, table, folder / f"{name}.png", title=title) for name, draw in drawings.items()]


def _save(draw: Any, table: pd.DataFrame, target: Path, *, title: str) -> Path:
    from matplotlib.figure import Figure  # not pyplot: no state, no screen

    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    axes = figure.subplots()
    draw(axes, table)
    axes.set_title(title, fontsize=9)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    temporary = target.with_suffix(".tmp.png")
    try:
        figure.savefig(temporary, dpi=130)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _points(axes: "Axes", table: pd.DataFrame, x: np.ndarray, y: np.ndarray) -> None:
    for sex in SEXES:
        of_sex = (table["sex"] == sex).to_numpy()
        axes.scatter(
            x[of_sex],
            y[of_sex],
            s=14,
            marker=_MARKERS[sex],
            color=_COLOURS[sex],
            alpha=0.45,
            linewidths=0,
            label=f"{sex} (n = {of_sex.sum():,})",
        )


def _scatter(axes: "Axes", table: pd.DataFrame) -> None:
    reference, predicted = table["reference_months"].to_numpy(), table["predicted_months"].to_numpy()
    _points(axes, table, reference, predicted)
    ends = [min(0.0, predicted.min()), max(reference.max(), predicted.max()) + 6]
    axes.plot(ends, ends, color="black", linewidth=1, label="equal")
    for offset in (-12, 12):
        axes.plot(ends, [end + offset for end in ends], color="black", linewidth=0.7, linestyle=":")
    axes.plot([], [], color="black", linewidth=0.7, linestyle=":", label="12 months off")
    axes.set(
        xlabel="reference bone age (months)",
        ylabel="predicted bone age (months)",
        xlim=ends,
        ylim=ends,
        aspect="equal",
    )
    axes.legend(loc="upper left", fontsize=8)


def _bland_altman(axes: "Axes", table: pd.DataFrame) -> None:
    reference, predicted = table["reference_months"].to_numpy(), table["predicted_months"].to_numpy()
    _points(axes, table, (reference + predicted) / 2, predicted - reference)
    low, bias, high = limits_of_agreement(predicted, reference)
    axes.axhline(0, color="#777777", linewidth=0.8)
    axes.axhline(bias, color="black", linewidth=1.2, label=f"bias {bias:+.1f} months")
    for limit in (low, high):
        axes.axhline(limit, color="black", linewidth=1, linestyle="--")
    axes.plot([], [], color="black", linestyle="--", label=f"limits of agreement {low:+.1f} to {high:+.1f}")
    axes.set(xlabel="mean of prediction and reference (months)", ylabel="prediction - reference (months)")
    axes.legend(loc="upper right", fontsize=8)


def _error_by_age(axes: "Axes", table: pd.DataFrame) -> None:
    reference = table["reference_months"].to_numpy()
    errors = np.abs(table["predicted_months"].to_numpy() - reference)
    bands = np.array([age_band(months) for months in reference])
    shown = np.unique(bands)
    parts = [errors[bands == band] for band in shown]
    names = [f"{age_band_name(int(band))}\nn = {len(part)}" for band, part in zip(shown, parts, strict=True)]
    axes.boxplot(
        parts,
        tick_labels=names,
        whis=(5, 95),
        showfliers=False,
        showmeans=True,
        medianprops={"color": "black"},
        meanprops={"marker": "D", "markerfacecolor": "#D55E00", "markeredgecolor": "none", "markersize": 6},
    )
    axes.plot([], [], "D", color="#D55E00", label="mean (MAE of the band)")
    axes.plot([], [], color="black", label="median; box: middle half; whiskers: 5 to 95 %")
    axes.axhline(errors.mean(), color="#0072B2", linestyle="--", linewidth=1, label=f"MAE of all {errors.mean():.2f}")
    axes.tick_params(axis="x", labelsize=7)
    axes.set(xlabel="reference bone age (months)", ylabel="absolute error (months)")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.25)  # room for the legend
    axes.legend(loc="upper right", fontsize=8)
