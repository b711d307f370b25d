"""Plots of a prepared data set: how ages and sexes are distributed, and what the training augmentation makes of it.

No plot names an id. Only the contact sheet of the augmentation shows images.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .augmentation import AUGMENTATIONS, apply, sample
from .data import load_prepared, load_split, read_manifest
from .errors import InputError
from .image_processing_boneage import BoneAgeImageProcessor
from .radiograph import read
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

_SHEET_IMAGES = 6
_SHEET_VERSIONS = 5
_SHEET_AUGMENTATIONS = ("reference", "strong", "wide")
_SHEET_GAP = 6  # px


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
    * ``augmentation.png``: images of the training split, as :func:`augmentation_sheet` draws them.

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
    sheet = augmentation_sheet(dataset_folder)
    if drawn:
        sheet.supxlabel("drawn phantoms, not radiographs", fontsize="small", color=_NEUTRAL)
    paths.append(_save(sheet, out / "augmentation.png"))
    return paths


def augmentation_sheet(dataset_folder: str | os.PathLike[str], *, seed: int = 0) -> Figure:
    """Contact sheet: the first 6 training images as the model reads them, and 5 random versions of each.

    The images are prepared as the recipes prepare them, at 384 px; below them come the versions of the
    augmentations "reference", "strong" and "wide", one image to a column. It shows images of the data set, under
    whose terms it falls.

    Raises:
        InputError: as :func:`boneage_hf.data.load_split`, or if an image cannot be read (its row id is named).
    """
    train = load_split(dataset_folder, "train").cast_column("image", datasets.Image(decode=False))
    processor = BoneAgeImageProcessor(source_size=299)
    prepared = []
    for row in train.select(range(min(_SHEET_IMAGES, len(train)))):
        try:
            prepared.append(processor.prepare(read(row["image"]["bytes"]).image))
        except InputError as error:
            raise InputError(f"Image of row {row['id']}: {error}") from None
    images = torch.from_numpy(np.stack(prepared))  # (B, H, W)
    blocks = {"prepared for the model": [images]}
    for name in _SHEET_AUGMENTATIONS:
        generator = torch.Generator().manual_seed(seed)
        blocks[f'augmentation "{name}"'] = [
            apply(images, sample(AUGMENTATIONS[name], len(images), generator)) for _ in range(_SHEET_VERSIONS)
        ]
    heights = [len(rows) for rows in blocks.values()]
    figure = Figure(figsize=(1.2 * len(images) + 0.2, 1.2 * sum(heights) + 1.2), layout="constrained")
    panels = figure.subplots(len(blocks), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, rows) in zip(panels, blocks.items(), strict=True):
        axes.imshow(_contact_sheet(rows), cmap="gray", vmin=0, vmax=255)
        axes.set_title(title, loc="left", fontsize="medium")
        axes.set_axis_off()
    return figure


def _contact_sheet(rows: list[torch.Tensor]) -> np.ndarray:
    """Rows of (B, H, W) images, values 0..255 -> one uint8 picture (h, w) with white gaps between the images."""
    count, height, width = rows[0].shape
    down, across = height + _SHEET_GAP, width + _SHEET_GAP
    sheet = np.full((len(rows) * down - _SHEET_GAP, count * across - _SHEET_GAP), 255, dtype=np.uint8)
    for y, row in enumerate(rows):
        for x, image in enumerate(row.round().to(torch.uint8).numpy()):
            sheet[y * down : y * down + height, x * across : x * across + width] = image
    return sheet


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
