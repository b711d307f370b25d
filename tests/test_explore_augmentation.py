"""The contact sheet of the augmentation; on drawn phantoms."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from boneage_hf import explore
from boneage_hf.augmentation import AUGMENTATIONS, apply, sample
from boneage_hf.data import load_split, prepare_phantoms
from boneage_hf.errors import InputError
from boneage_hf.image_processing_boneage import BoneAgeImageProcessor

SIDE, GAP = 384, 6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("explore") / "out"
    prepare_phantoms(16, out, seed=1, size=64)
    return out


@pytest.fixture(scope="module")
def prepared(dataset: Path) -> np.ndarray:
    """(B, H, W) of the first six training images, one by one."""
    processor, train = BoneAgeImageProcessor(source_size=299), load_split(dataset, "train")
    return np.stack([processor.prepare(train[index]["image"]) for index in range(min(6, len(train)))])


def pictures(figure: Figure) -> list[np.ndarray]:
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes]


def tile(picture: np.ndarray, row: int, column: int) -> np.ndarray:
    y, x = row * (SIDE + GAP), column * (SIDE + GAP)
    return picture[y : y + SIDE, x : x + SIDE]


def test_the_sheet_shows_one_row_of_images_and_five_versions_of_each_augmentation(
    dataset: Path, prepared: np.ndarray
) -> None:
    figure = explore.augmentation_sheet(dataset)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        "prepared for the model",
        *(f'augmentation "{name}"' for name in ("reference", "strong", "wide")),
    ]
    width = len(prepared) * (SIDE + GAP) - GAP
    assert [picture.shape for picture in pictures(figure)] == [
        (rows * (SIDE + GAP) - GAP, width) for rows in (1, 5, 5, 5)
    ]


def test_the_first_row_is_what_the_image_processor_prepares(dataset: Path, prepared: np.ndarray) -> None:
    first = pictures(explore.augmentation_sheet(dataset))[0]
    for column, image in enumerate(prepared):
        np.testing.assert_array_equal(tile(first, 0, column), image)


@pytest.mark.parametrize(("block", "name"), [(1, "reference"), (2, "strong"), (3, "wide")])
def test_the_versions_are_those_of_the_training_augmentation(
    block: int, name: str, dataset: Path, prepared: np.ndarray
) -> None:
    picture = pictures(explore.augmentation_sheet(dataset, seed=3))[block]
    images, generator = torch.from_numpy(prepared), torch.Generator().manual_seed(3)
    for row in range(5):
        versions = apply(images, sample(AUGMENTATIONS[name], len(images), generator))
        for column, version in enumerate(versions):
            np.testing.assert_array_equal(tile(picture, row, column), version.round().numpy())


def test_another_seed_gives_other_versions_of_the_same_images(dataset: Path) -> None:
    one, other = (pictures(explore.augmentation_sheet(dataset, seed=seed)) for seed in (0, 1))
    np.testing.assert_array_equal(one[0], other[0])
    assert (one[1] != other[1]).any()
    assert (one[2] != other[2]).any()


def test_a_small_training_split_makes_a_narrow_sheet(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def two_rows(data: Any, name: str) -> Any:
        return load_split(data, name).select([0, 1])

    monkeypatch.setattr(explore, "load_split", two_rows)
    assert pictures(explore.augmentation_sheet(dataset))[0].shape == (SIDE, 2 * SIDE + GAP)


def test_an_image_that_cannot_be_read_is_named_by_its_row_id(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(content: bytes) -> None:
        raise InputError("it is damaged.")

    monkeypatch.setattr(explore, "read", refuse)
    row_id = load_split(dataset, "train")[0]["id"]
    with pytest.raises(InputError, match=f"^Image of row {row_id}: it is damaged"):
        explore.augmentation_sheet(dataset)


def test_the_sheet_lies_beside_the_plots(dataset: Path, tmp_path: Path) -> None:
    paths = explore.explore(dataset, tmp_path / "plots")
    assert paths[-1] == tmp_path / "plots" / "augmentation.png"
    assert sorted((tmp_path / "plots").iterdir()) == sorted(paths)
