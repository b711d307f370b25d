"""Feature maps of a frozen backbone: the same as without the cache, computed once, whole after an interruption."""

import dataclasses
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from boneage_hf import augmentation, features
from boneage_hf.configuration_boneage import BoneAgeConfig
from boneage_hf.data import prepare_phantoms
from boneage_hf.errors import InputError
from boneage_hf.features import CachedFeatures, cached_features
from boneage_hf.image_processing_boneage import BoneAgeImageProcessor
from boneage_hf.modeling_boneage import BoneAgeModel
from boneage_hf.prepared import PreparedImages
from boneage_hf.recipes import Recipe
from boneage_hf.training import train

PROCESSOR = BoneAgeImageProcessor(size={"height": 64, "width": 64})
NONE, STRONG = augmentation.AUGMENTATIONS["none"], augmentation.AUGMENTATIONS["strong"]


@pytest.fixture(scope="module")
def model() -> BoneAgeModel:
    torch.manual_seed(0)
    return BoneAgeModel(BoneAgeConfig(backbone="tiny", image_size=64)).eval()


@pytest.fixture(scope="module")
def images() -> PreparedImages:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (10, 64, 64), dtype=np.uint8)
    return PreparedImages(pixels, np.zeros(10, np.int64), np.full(10, 100, np.float32), tuple("abcdefghij"))


def compute(
    model: BoneAgeModel,
    images: PreparedImages,
    cache: Path,
    *,
    changes: augmentation.Augmentation = STRONG,
    views: int = 2,
    seed: int = 0,
    progress: bool = False,
) -> CachedFeatures:
    return cached_features(
        model,
        PROCESSOR,
        images,
        cache=cache,
        name="train",
        changes=changes,
        views=views,
        seed=seed,
        batch_size=4,
        progress=progress,
    )


def test_unchanged_images_have_the_backbones_own_features(
    model: BoneAgeModel, images: PreparedImages, tmp_path: Path
) -> None:
    cached = compute(model, images, tmp_path, changes=NONE, views=1)
    for index in range(len(images)):
        pixels = torch.from_numpy(images.pixels[index : index + 1])
        with torch.no_grad():
            own = model.backbone(PROCESSOR.to_pixel_values(pixels))[0]
        np.testing.assert_allclose(cached.maps[index], own.numpy(), rtol=2e-3, atol=1e-4)


def test_views_of_an_image_differ(model: BoneAgeModel, images: PreparedImages, tmp_path: Path) -> None:
    cached = compute(model, images, tmp_path)
    first, second = (cached.of(np.arange(10), np.full(10, view)) for view in (0, 1))
    assert all(not np.array_equal(*pair) for pair in zip(first, second, strict=True))


def test_each_image_is_given_in_the_view_that_was_asked_for(
    model: BoneAgeModel, images: PreparedImages, tmp_path: Path
) -> None:
    cached = compute(model, images, tmp_path)
    some = cached.of(np.array([3, 7]), np.array([1, 0]))
    np.testing.assert_array_equal(some[0], cached.maps[13])
    np.testing.assert_array_equal(some[1], cached.maps[7])


def test_features_are_computed_once(
    model: BoneAgeModel, images: PreparedImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compute(model, images, tmp_path)

    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(features._Batches, "compute", fail)
    np.testing.assert_array_equal(compute(model, images, tmp_path).maps, first.maps)


@pytest.mark.parametrize("what", ["backbone", "pixels", "augmentation", "seed", "views"])
def test_features_of_other_inputs_are_not_taken_for_these(
    what: str, model: BoneAgeModel, images: PreparedImages, tmp_path: Path
) -> None:
    compute(model, images, tmp_path)
    options: dict[str, Any] = {}
    if what == "backbone":
        torch.manual_seed(1)
        model = BoneAgeModel(BoneAgeConfig(backbone="tiny", image_size=64)).eval()
    elif what == "pixels":
        images = dataclasses.replace(images, pixels=images.pixels ^ 1)
    else:
        options = dict([{"augmentation": ("changes", NONE), "seed": ("seed", 1), "views": ("views", 3)}[what]])
    compute(model, images, tmp_path, **options)
    assert len(list(tmp_path.glob("*.f16"))) == 2


def test_the_head_does_not_decide_whose_features_they_are(
    model: BoneAgeModel, images: PreparedImages, tmp_path: Path
) -> None:
    other = BoneAgeModel(BoneAgeConfig(backbone="tiny", image_size=64, sex_input="embedding")).eval()
    other.backbone.load_state_dict(model.backbone.state_dict())
    compute(model, images, tmp_path)
    compute(other, images, tmp_path)
    assert len(list(tmp_path.glob("*.f16"))) == 1


@pytest.mark.parametrize("batches", [1, 4])
def test_an_interrupted_computation_goes_on_and_gives_the_same_features(
    batches: int, model: BoneAgeModel, images: PreparedImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compute(model, images, tmp_path / "whole")
    done: list[tuple[int, int]] = []
    own = features._Batches.compute

    def stopping(self: features._Batches, view: int, start: int) -> np.ndarray:
        if len(done) == batches:
            raise KeyboardInterrupt
        done.append((view, start))
        return own(self, view, start)

    with monkeypatch.context() as patch:
        patch.setattr(features._Batches, "compute", stopping)
        with pytest.raises(KeyboardInterrupt):
            compute(model, images, tmp_path / "stopped")
    (part,) = (tmp_path / "stopped").glob("*.part")
    with part.open("ab") as file:
        file.write(b"half of a row")  # what a killed process may leave
    again: list[tuple[int, int]] = []

    def counting(self: features._Batches, view: int, start: int) -> np.ndarray:
        again.append((view, start))
        return own(self, view, start)

    monkeypatch.setattr(features._Batches, "compute", counting)
    resumed = compute(model, images, tmp_path / "stopped")
    np.testing.assert_array_equal(resumed.maps, whole.maps)
    assert len(again) == 6 - batches  # two views of ten images in batches of four
    assert not list((tmp_path / "stopped").glob("*.part"))


def test_two_trainings_that_share_a_cache_compute_it_once_and_read_the_same(
    model: BoneAgeModel,
    images: PreparedImages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = compute(model, images, tmp_path / "whole")
    begun, done = threading.Event(), []
    own = features._Batches.compute

    def slowly(self: features._Batches, view: int, start: int) -> np.ndarray:
        done.append((view, start))
        if len(done) == 2:  # something is in the file
            begun.set()
        time.sleep(0.1)
        return own(self, view, start)

    monkeypatch.setattr(features._Batches, "compute", slowly)
    monkeypatch.setattr(features, "_PATIENCE", 0.05)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(compute, model, images, tmp_path / "shared")
        begun.wait(timeout=60)
        second = pool.submit(compute, model, images, tmp_path / "shared", progress=True)
    for found in (first.result(), second.result()):
        np.testing.assert_array_equal(found.maps, whole.maps)
    assert len(done) == 6  # two views of ten images in batches of four
    assert "another training computes the features of train: waiting for it" in capsys.readouterr().out


@pytest.mark.parametrize("change", [-2, 2])
def test_a_cache_of_another_size_is_refused_and_named(
    change: int, model: BoneAgeModel, images: PreparedImages, tmp_path: Path
) -> None:
    compute(model, images, tmp_path)
    (file,) = tmp_path.glob("*.f16")
    content = file.read_bytes()
    file.write_bytes(content[:change] if change < 0 else content + bytes(change))
    message = rf"{file.name} is damaged \({len(content) + change} bytes instead of {len(content)}\): delete it"
    with pytest.raises(InputError, match=message):
        compute(model, images, tmp_path)


def test_features_among_which_something_else_has_written_do_not_get_their_name(
    model: BoneAgeModel, images: PreparedImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = features._Batches.compute

    def disturbed(self: features._Batches, view: int, start: int) -> np.ndarray:
        if (view, start) == (1, 4):
            (part,) = tmp_path.glob("*.part")
            with part.open("ab") as file:
                file.write(b"not ours")
        return own(self, view, start)

    with monkeypatch.context() as patch:
        patch.setattr(features._Batches, "compute", disturbed)
        with pytest.raises(InputError, match=r"written to by something else .*: start again"):
            compute(model, images, tmp_path)
    assert not [*tmp_path.glob("*.f16"), *tmp_path.glob("*.part")]
    assert len(compute(model, images, tmp_path)) == len(images)


def test_features_beyond_float16_are_refused(images: PreparedImages, tmp_path: Path) -> None:
    model = BoneAgeModel(BoneAgeConfig(backbone="vgg19", image_size=64)).eval()
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.mul_(10)
    with pytest.raises(InputError, match="range of float16"):
        compute(model, images, tmp_path)
    assert not list(tmp_path.glob("*.f16"))


def test_a_cache_that_cannot_be_written_is_one_sentence(
    model: BoneAgeModel, images: PreparedImages, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cache of features cannot be written"):
        compute(model, images, tmp_path / "file")


# --- in training ----------------------------------------------------------------------------------------------------

FROZEN = Recipe(
    backbone="tiny",
    freeze_backbone=True,
    image_size=64,
    source_size=None,
    augmentation="none",
    epochs=2,
    batch_size=16,
    eval_batch_size=8,
    ema=0.0,
)


@pytest.fixture(autouse=True)
def forget_precision() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "prepared"
    prepare_phantoms(120, folder, size=64, progress=False)
    return folder


def test_training_on_cached_features_learns_what_training_through_the_backbone_learns(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BONEAGE_RUNS", str(tmp_path))
    errors = []
    for views in (0, 1):
        recipe = dataclasses.replace(FROZEN, cached_views=views)
        result = train(phantoms, tmp_path / str(views), recipe, initial_weights="random", progress_bar=False)
        errors.append(result.validation_mae_months)
        AcceleratorState._reset_state(reset_partial_state=True)
    assert len(list((tmp_path / "features").glob("*.f16"))) == 2  # train and selection
    assert errors[1] == pytest.approx(errors[0], abs=0.5)


def test_training_on_cached_views_is_resumed_bit_for_bit(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BONEAGE_RUNS", str(tmp_path))
    recipe = dataclasses.replace(FROZEN, augmentation="reference", cached_views=3)
    train(phantoms, tmp_path / "one", recipe, initial_weights="random", progress_bar=False)
    with monkeypatch.context() as patch:
        from boneage_hf.training import TrainingRun

        own = TrainingRun.finish_epoch

        def stop_after_the_first(self: TrainingRun) -> None:
            own(self)
            raise KeyboardInterrupt

        patch.setattr(TrainingRun, "finish_epoch", stop_after_the_first)
        with pytest.raises(KeyboardInterrupt):
            train(phantoms, tmp_path / "two", recipe, initial_weights="random", progress_bar=False)
    train(phantoms, tmp_path / "two", None, resume=True, progress_bar=False)
    weights = [(tmp_path / name / "checkpoint" / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
