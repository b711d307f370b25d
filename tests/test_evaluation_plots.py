"""The plots of an evaluation: limits of agreement by a plain loop, and pictures of what the table holds."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from boneage_hf import evaluation_plots
from boneage_hf.evaluation_plots import draw_evaluation, limits_of_agreement


@pytest.fixture
def table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    reference = rng.uniform(10, 220, 40)
    sexes = ["female", "male"] * 20
    return pd.DataFrame(
        {"predicted_months": reference + rng.normal(2, 8, 40), "reference_months": reference, "sex": sexes}
    )


def test_limits_of_agreement_are_those_of_a_plain_loop(table: pd.DataFrame) -> None:
    pairs = zip(table["predicted_months"].tolist(), table["reference_months"].tolist(), strict=True)
    errors = [predicted - reference for predicted, reference in pairs]
    bias = sum(errors) / 40
    spread = math.sqrt(sum((error - bias) ** 2 for error in errors) / 39)
    limits = limits_of_agreement(table["predicted_months"].to_numpy(), table["reference_months"].to_numpy())
    assert limits == pytest.approx((bias - 1.96 * spread, bias, bias + 1.96 * spread))


def test_three_pictures_are_written_and_nothing_else(table: pd.DataFrame, tmp_path: Path) -> None:
    paths = draw_evaluation(table, tmp_path, title="tiny")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bland_altman.png", "error_by_age.png", "scatter.png"]
    assert all(min(Image.open(path).size) > 500 for path in paths)


def test_every_image_is_a_point_at_its_reference_and_prediction(table: pd.DataFrame) -> None:
    axes = Figure().subplots()
    evaluation_plots._scatter(axes, table)
    points = np.concatenate([np.asarray(collection.get_offsets()) for collection in axes.collections])
    expected = table[["reference_months", "predicted_months"]].to_numpy()
    np.testing.assert_allclose(points[np.lexsort(points.T)], expected[np.lexsort(expected.T)])


def test_the_error_of_a_band_is_that_of_its_images(table: pd.DataFrame) -> None:
    axes = Figure().subplots()
    evaluation_plots._error_by_age(axes, table)
    counts = [int(label.get_text().split("n = ")[1]) for label in axes.get_xticklabels()]
    assert sum(counts) == 40
    first = table[table["reference_months"] < 24]
    assert counts[0] == len(first)


def test_one_sex_alone_is_drawn_too(table: pd.DataFrame, tmp_path: Path) -> None:
    assert len(draw_evaluation(table[table["sex"] == "male"], tmp_path, title="boys")) == 3
