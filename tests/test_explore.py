"""Plots of a prepared data set; on drawn phantoms."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from scipy import stats

from boneage_hf.data import load_prepared, prepare_phantoms
from boneage_hf.errors import InputError
from boneage_hf.explore import (
    Labels,
    draw_ages,
    draw_ages_by_sex,
    draw_sex_counts,
    draw_z_scores,
    explore,
    read_labels,
    skewness,
    z_scores,
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("explore") / "out"
    prepare_phantoms(16, out, seed=1, size=64)
    return out


@pytest.fixture
def labels() -> Labels:
    rng = np.random.default_rng(0)
    ages = np.concatenate([rng.uniform(0, 240, 90), [0.0, 240.0, 24.0]])
    return Labels(ages, rng.integers(0, 2, 93), np.repeat(["train", "validation", "test"], [60, 20, 13]))


def axes() -> Axes:
    return Figure().add_subplot()


def bar_heights(drawn: Axes) -> list[float]:
    return [patch.get_height() for patch in drawn.patches if isinstance(patch, Rectangle)]


def test_four_plots_and_a_contact_sheet_are_drawn_and_nothing_else(prepared: Path, tmp_path: Path) -> None:
    paths = explore(prepared, tmp_path / "plots")
    assert [path.name for path in paths] == [
        "bone_age_months.png",
        "bone_age_z_score.png",
        "sex_counts.png",
        "bone_age_by_sex.png",
        "augmentation.png",
    ]
    assert sorted(paths) == sorted((tmp_path / "plots").iterdir())
    for path in paths[:4]:
        with Image.open(path) as image:
            assert image.size == (960, 600)
            assert np.asarray(image.convert("L")).std() > 10


def test_the_labels_are_those_of_all_splits(prepared: Path) -> None:
    labels = read_labels(prepared)
    rows = [
        (name, row["bone_age_months"], row["sex"]) for name, part in load_prepared(prepared).items() for row in part
    ]
    assert list(zip(labels.split.tolist(), labels.bone_age_months, labels.sex, strict=True)) == rows


def test_the_age_histogram_counts_every_image_also_at_both_bounds(labels: Labels) -> None:
    drawn = axes()
    draw_ages(drawn, labels)
    assert sum(bar_heights(drawn)) == 93


def test_the_z_score_histogram_counts_every_image(labels: Labels) -> None:
    drawn = axes()
    draw_z_scores(drawn, labels)
    assert sum(bar_heights(drawn)) == 93


def test_the_sex_bars_are_the_counts_of_each_split(labels: Labels) -> None:
    drawn = axes()
    draw_sex_counts(drawn, labels)
    expected = [
        int(((labels.sex == sex) & (labels.split == split)).sum())
        for sex in (0, 1)
        for split in ("train", "validation", "test")
    ]
    assert bar_heights(drawn) == expected
    assert sum(expected) == 93


def test_a_data_set_of_one_sex_can_be_drawn() -> None:
    drawn = axes()
    draw_ages_by_sex(drawn, Labels(np.array([10.0, 20.0]), np.array([1, 1]), np.array(["train", "train"])))
    legend = drawn.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["male: median 15, quartiles 12 to 18 months"]


def test_z_scores_have_mean_0_and_sd_1() -> None:
    z = z_scores(np.array([1.0, 2.0, 4.0, 9.0]))
    assert z.mean() == pytest.approx(0)
    assert z.std(ddof=1) == pytest.approx(1)


@pytest.mark.parametrize("values", [[5.0], [5.0, 5.0]])
def test_ages_that_do_not_differ_have_z_score_0(values: list[float]) -> None:
    assert z_scores(np.array(values)).tolist() == [0.0] * len(values)
    assert skewness(np.array(values)) == 0.0


def test_the_skewness_is_fishers(labels: Labels) -> None:
    assert skewness(labels.bone_age_months) == pytest.approx(stats.skew(labels.bone_age_months))


def test_a_file_in_place_of_the_plot_folder_is_refused(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "plots").write_text("precious", encoding="utf-8")
    with pytest.raises(InputError, match="is a file; give a folder"):
        explore(prepared, tmp_path / "plots")


def test_a_folder_that_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no prepared data set"):
        explore(tmp_path, tmp_path / "plots")
