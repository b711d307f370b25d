"""The cache of prepared images: what it holds, when it is used again, and what happens when it cannot be written."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from boneage_hf import prepared, radiograph
from boneage_hf.data import FEATURES, load_split, prepare_phantoms
from boneage_hf.errors import InputError
from boneage_hf.image_processing_boneage import BoneAgeImageProcessor
from boneage_hf.prepared import PreparedImages, prepare_image, prepare_images


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> datasets.Dataset:
    """Ten drawn hands of 64 px as a split of a prepared data set."""
    folder = tmp_path_factory.mktemp("phantoms") / "prepared"
    prepare_phantoms(12, folder, size=64, progress=False)
    return load_split(folder, "train")


@pytest.fixture
def processor() -> BoneAgeImageProcessor:
    return BoneAgeImageProcessor(size={"height": 48, "width": 32})


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Row ids of the images that are read and prepared from now on."""
    ids: list[str] = []

    def spy(content: bytes, processor: BoneAgeImageProcessor, *, row_id: str) -> np.ndarray:
        ids.append(row_id)
        return prepare_image(content, processor, row_id=row_id)

    monkeypatch.setattr(prepared, "prepare_image", spy)
    return ids


def rows_of(split: datasets.Dataset) -> list[dict[str, Any]]:
    """The rows with their images as stored bytes."""
    return list(split.cast_column("image", datasets.Image(decode=False)))


def rebuilt(rows: list[dict[str, Any]]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows, features=FEATURES)


def prepare(split: datasets.Dataset, processor: BoneAgeImageProcessor, cache: Path | None) -> PreparedImages:
    return prepare_images(split, processor, cache=cache, name="train", progress=False)


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes: writing fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- content --------------------------------------------------------------------------------------------------------


def test_a_prepared_image_is_what_the_processor_makes_of_the_stored_file(
    split: datasets.Dataset, processor: BoneAgeImageProcessor, tmp_path: Path
) -> None:
    images = prepare(split, processor, tmp_path)
    assert len(images) == len(split)
    for row, pixels in zip(rows_of(split), images.pixels, strict=True):
        assert np.array_equal(pixels, processor.prepare(radiograph.read(row["image"]["bytes"]).image))


def test_prepared_images_are_bytes_of_the_models_size(
    split: datasets.Dataset, processor: BoneAgeImageProcessor, tmp_path: Path
) -> None:
    images = prepare(split, processor, tmp_path)
    assert (images.pixels.dtype, images.pixels.shape) == (np.uint8, (len(split), 48, 32))


def test_labels_ids_and_sex_are_those_of_the_split_in_its_order(
    split: datasets.Dataset, processor: BoneAgeImageProcessor
) -> None:
    images = prepare(split, processor, None)
    assert images.ids == tuple(split["id"])
    assert images.sex.tolist() == list(split["sex"])
    assert images.bone_age_months.tolist() == list(split["bone_age_months"])
    assert (images.sex.dtype, images.bone_age_months.dtype) == (np.int64, np.float32)


def test_images_in_memory_equal_those_of_the_cache(
    split: datasets.Dataset, processor: BoneAgeImageProcessor, tmp_path: Path
) -> None:
    assert np.array_equal(prepare(split, processor, None).pixels, prepare(split, processor, tmp_path).pixels)


def test_cached_images_cannot_be_written_to(
    split: datasets.Dataset, processor: BoneAgeImageProcessor, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="read-only"):
        prepare(split, processor, tmp_path).pixels[0] = 0


# --- reuse ----------------------------------------------------------------------------------------------------------


def test_nothing_is_read_again_when_nothing_has_changed(
    split: datasets.Dataset, processor: BoneAgeImageProcessor, tmp_path: Path, readings: list[str]
) -> None:
    first = np.array(prepare(split, processor, tmp_path).pixels)
    assert readings == list(split["id"])
    second = prepare(split, BoneAgeImageProcessor(size={"height": 48, "width": 32}), tmp_path)
    assert len(readings) == len(split)
    assert np.array_equal(first, second.pixels)


def test_a_changed_byte_of_one_image_has_all_prepared_anew(
    split: datasets.Dataset, processor: BoneAgeImageProcessor, tmp_path: Path, readings: list[str]
) -> None:
    prepare(split, processor, tmp_path)
    rows = rows_of(split)
    rows[3]["image"]["bytes"] += b"\x00"
    prepare(rebuilt(rows), processor, tmp_path)
    assert readings == [*split["id"], *split["id"]]


@pytest.mark.parametrize(
    "change",
    [
        {"size": {"height": 32, "width": 48}},
        {"source_size": 40},
        {"resize_mode": "pad"},
        {"correct_polarity": False},
        {"stretch_percentiles": (2.0, 98.0)},
        {"stretch_percentiles": None},
    ],
)
def test_a_changed_setting_of_the_processor_has_all_prepared_anew(
    change: dict[str, Any],
    split: datasets.Dataset,
    processor: BoneAgeImageProcessor,
    tmp_path: Path,
    readings: list[str],
) -> None:
    few = split.select(range(2))
    prepare(few, processor, tmp_path)
    other = BoneAgeImageProcessor(**{"size": processor.size, **change})
    images = prepare(few, other, tmp_path)
    assert len(readings) == 4
    assert images.pixels.shape[1:] == (other.size["height"], other.size["width"])


def test_another_order_of_the_same_rows_is_not_taken_for_the_same(
    split: datasets.Dataset, processor: BoneAgeImageProcessor, tmp_path: Path
) -> None:
    forward = prepare(split, processor, tmp_path)
    backward = prepare(rebuilt(rows_of(split)[::-1]), processor, tmp_path)
    assert backward.ids == forward.ids[::-1]
    assert np.array_equal(backward.pixels, forward.pixels[::-1])


def test_corrected_labels_are_used_with_the_images_that_are_cached(
    split: datasets.Dataset, processor: BoneAgeImageProcessor, tmp_path: Path, readings: list[str]
) -> None:
    prepare(split, processor, tmp_path)
    corrected = [row | {"bone_age_months": 100.0, "sex": 1} for row in rows_of(split)]
    images = prepare(rebuilt(corrected), processor, tmp_path)
    assert len(readings) == len(split)
    assert set(images.bone_age_months) == {100.0}
    assert set(images.sex) == {1}


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_an_unreadable_image_is_named_by_its_row_and_leaves_nothing_in_the_cache(
    split: datasets.Dataset, processor: BoneAgeImageProcessor, tmp_path: Path
) -> None:
    rows = rows_of(split)
    rows[4]["image"]["bytes"] = rows[4]["image"]["bytes"][:100]
    with pytest.raises(InputError, match=f"^Image of row {rows[4]['id']}: "):
        prepare(rebuilt(rows), processor, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_disk_that_fills_up_is_one_sentence_and_leaves_nothing_in_the_cache(
    split: datasets.Dataset, processor: BoneAgeImageProcessor, tmp_path: Path
) -> None:
    with files_limited_to(5_000), pytest.raises(InputError, match=r"cannot be written .*BONEAGE_RUNS"):
        prepare(split, processor, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_folder_that_cannot_be_made_is_one_sentence(
    split: datasets.Dataset, processor: BoneAgeImageProcessor, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="BONEAGE_RUNS"):
        prepare(split, processor, tmp_path / "file" / "cache")


def test_preparing_can_be_silent(
    split: datasets.Dataset, processor: BoneAgeImageProcessor, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(split, processor, None)
    assert capsys.readouterr() == ("", "")
