"""Plots of a prepared data set: how the ages and the sexes are distributed. Aggregates only, no image and no id."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .data import load_prepared, read_manifest
from .errors import InputError
from .sex import SEXES
from .splits import AGE_BAND_MONTHS, MAX_BONE_AGE_MONTHS, MIN_BONE_AGE_MONTHS

# Okabe & Ito, Color Universal Design (2008): told apart with any colour vision, and in grey by their lightness.
_COLOURS = {"female": "#E69F00", "male": "#0072B2"}
_NEUTRAL = "#595959"

# Readers prefer whole and half years (four labels in five are multiples of 6 months), and z-scores inherit it: bins of
# a year, and of about as much in SD, show the distribution and not the habit.
_BIN_MONTHS = 12
_BIN_SD = 0.3
_BAR_STEP = 0.4


@dataclass(frozen=True)
class Labels:
    """The labels of a prepared data set, all splits in one.

    Args:
        bone_age_months: (N,) float64, months.
        sex: (N,) int64, index into ``SEXES``.
        split: (N,) str.
    """

    bone_age_months: np.ndarray
    sex: np.ndarray
    split: np.ndarray

    def of_sex(self, index: int) -> np.ndarray:
        """(n,) ages in months of one sex."""
        return self.bone_age_months[self.sex == index]


def read_labels(dataset_folder: str | os.PathLike[str]) -> Labels:
    """Read ages, sexes and splits of a prepared data set; no image is decoded.

    Raises:
        InputError: as :func:`boneage_hf.data.load_prepared`.
    """
    ages, sexes, splits = [], [], []
    for name, split in load_prepared(dataset_folder).items():
        columns = split.select_columns(["bone_age_months", "sex"]).with_format("numpy")[:]
        ages.append(np.asarray(columns["bone_age_months"], dtype=np.float64))
        sexes.append(np.asarray(columns["sex"], dtype=np.int64))
        splits.append(np.full(len(ages[-1]), str(name)))
    return Labels(np.concatenate(ages), np.concatenate(sexes), np.concatenate(splits))


def explore(dataset_folder: str | os.PathLike[str], out_folder: str | os.PathLike[str]) -> list[Path]:
    """Draw the distributions of a prepared data set as PNG files.

    * ``bone_age_months.png``: histogram of the ages, with mean and median.
    * ``bone_age_z_score.png``: histogram of (age - mean) / SD over the whole data set, sample SD.
    * ``sex_counts.png``: girls and boys in each split.
    * ``bone_age_by_sex.png``: the ages of girls and of boys over each other, and their quartiles.

    Args:
        dataset_folder: what :func:`boneage_hf.data.prepare` wrote.
        out_folder: where the files go; made if need be, files of the same name are replaced.

    Returns:
        The paths of the files.

    Raises:
        InputError: if there is no prepared data set, or ``out_folder`` is a file.
    """
    labels = read_labels(dataset_folder)
    drawn = read_manifest(dataset_folder)["kind"] == "phantom"
    out = Path(out_folder)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder for the plots.")
    out.mkdir(parents=True, exist_ok=True)
    plots: dict[str, Callable[[Axes, Labels], None]] = {
        "bone_age_months": draw_ages,
        "bone_age_z_score": draw_z_scores,
        "sex_counts": draw_sex_counts,
        "bone_age_by_sex": draw_ages_by_sex,
    }
    paths = []
    for name, draw in plots.items():
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        draw(axes, labels)
        axes.spines[["top", "right"]].set_visible(False)
        if drawn:
            figure.supxlabel("drawn phantoms, not radiographs", fontsize="small", color=_NEUTRAL)
        paths.append(_save(figure, out / f"{name}.png"))
    return paths


def draw_ages(axes: Axes, labels: Labels) -> None:
    """Histogram of the bone ages in bins of 12 months."""
    ages = labels.bone_age_months
    axes.hist(ages, bins=_age_bins(), color=_NEUTRAL, edgecolor="white", linewidth=0.5)
    axes.axvline(float(ages.mean()), color="black", label=f"mean {ages.mean():.1f} months")
    median = float(np.median(ages))
    axes.axvline(median, color="black", linestyle="--", label=f"median {median:.1f} months")
    _label_ages(axes)
    axes.set_title(f"Bone age, n = {len(ages):,}")
    axes.legend(frameon=False)


def draw_z_scores(axes: Axes, labels: Labels) -> None:
    """Histogram of the standardised bone ages; (age - mean) / sample SD."""
    z = z_scores(labels.bone_age_months)
    count = int(max(np.abs(z).max(), 1.0) / _BIN_SD) + 1
    axes.hist(
        z, bins=(np.arange(-count, count + 1) * _BIN_SD).tolist(), color=_NEUTRAL, edgecolor="white", linewidth=0.5
    )
    axes.axvline(0.0, color="black")
    axes.set_xlabel("z-score of the bone age: (age - mean) / SD")
    axes.set_ylabel("images")
    axes.set_title(f"z-score of the bone age, skewness {skewness(z):+.2f}")


def draw_sex_counts(axes: Axes, labels: Labels) -> None:
    """Girls and boys in each split, as bars with their counts."""
    splits = list(dict.fromkeys(labels.split.tolist()))
    for index, sex in enumerate(SEXES):
        counts = [int(((labels.split == split) & (labels.sex == index)).sum()) for split in splits]
        places = np.arange(len(splits)) + (index - 0.5) * _BAR_STEP
        bars = axes.bar(places, counts, width=_BAR_STEP, color=_COLOURS[sex], label=f"{sex} ({sum(counts):,})")
        axes.bar_label(bars, fmt="{:,.0f}")
    axes.set_xticks(np.arange(len(splits)), splits)
    axes.set_ylabel("images")
    axes.set_title("Sex, by split")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend(frameon=False)


def draw_ages_by_sex(axes: Axes, labels: Labels) -> None:
    """Ages of girls and of boys as outlines, so that neither hides the other; quartiles in the legend."""
    for index, sex in enumerate(SEXES):
        ages = labels.of_sex(index)
        if len(ages) == 0:
            continue
        low, median, high = np.quantile(ages, [0.25, 0.5, 0.75])
        axes.hist(
            ages,
            bins=_age_bins(),
            histtype="step",
            linewidth=1.8,
            linestyle="-" if sex == "female" else "--",
            color=_COLOURS[sex],
            label=f"{sex}: median {median:.0f}, quartiles {low:.0f} to {high:.0f} months",
        )
    _label_ages(axes)
    axes.set_title("Bone age by sex")
    axes.legend(frameon=False, loc="upper left", fontsize="small")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.15)


def z_scores(values: np.ndarray) -> np.ndarray:
    """(N,) standardised values: (value - mean) / sample SD; all 0 if the values do not differ."""
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return np.zeros_like(values) if spread == 0.0 else (values - values.mean()) / spread


def skewness(values: np.ndarray) -> float:
    """Fisher's moment coefficient of skewness, m3 / m2**1.5 (population moments); 0 if the values do not differ."""
    centred = values - values.mean()
    variance = float((centred**2).mean())
    return 0.0 if variance == 0.0 else float((centred**3).mean()) / variance**1.5


def _age_bins() -> list[float]:
    return np.arange(MIN_BONE_AGE_MONTHS, MAX_BONE_AGE_MONTHS + _BIN_MONTHS, _BIN_MONTHS).tolist()


def _label_ages(axes: Axes) -> None:
    ticks = np.arange(MIN_BONE_AGE_MONTHS, MAX_BONE_AGE_MONTHS + 1, AGE_BAND_MONTHS)
    axes.set_xticks(ticks, [f"{tick:.0f}\n({tick / 12:.0f} y)" for tick in ticks])
    axes.set_xlabel("bone age, months (years)")
    axes.set_ylabel(f"images per {_BIN_MONTHS} months")


def _save(figure: Figure, path: Path) -> Path:
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=150)
    temporary.replace(path)
    return path
