"""Augmentation against slow, obvious references."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from boneage_hf.augmentation import AUGMENTATIONS, COARSEST, Augmentation, Parameters, affine_matrices, apply, sample

SIDE = 24


def unchanged(batch_size: int, **changes: float) -> Parameters:
    """Parameters that change nothing but what is named, the same for every image."""
    neutral = {
        "mirrored": 0.0,
        "shift_x": 0.0,
        "shift_y": 0.0,
        "angle": 0.0,
        "shear": 0.0,
        "zoom": 1.0,
        "gamma": 1.0,
        "contrast": 1.0,
        "brightness": 0.0,
        "erased": 0.0,
        "coarseness": 1.0,
    }
    values = {name: torch.full((batch_size,), value) for name, value in (neutral | changes).items()}
    return Parameters(**values, box=torch.full((batch_size, 4), 0.5))


def pictures(batch_size: int = 3, side: int = SIDE) -> torch.Tensor:
    """(B, side, side) uint8; rough in every direction, so that a shift by less than a pixel shows."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (batch_size, side, side), dtype=np.uint8))


def warp_pixel_by_pixel(image: np.ndarray, parameters: Parameters) -> np.ndarray:
    """Shear, rotate, scale, mirror and shift one square image; border repeated; bilinear."""
    side = len(image)
    mirrored, angle, shear, zoom, shift_x, shift_y = (
        float(getattr(parameters, name)[0]) for name in ("mirrored", "angle", "shear", "zoom", "shift_x", "shift_y")
    )
    result = np.zeros((side, side))
    for row in range(side):
        for column in range(side):
            x, y = column - (side - 1) / 2, row - (side - 1) / 2  # pixels from the middle
            x = x + shear * y
            x, y = math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y
            x, y = x / zoom, y / zoom
            x = -x if mirrored else x
            x, y = x + shift_x * side + (side - 1) / 2, y + shift_y * side + (side - 1) / 2
            x, y = min(max(x, 0.0), side - 1.0), min(max(y, 0.0), side - 1.0)
            left, top = min(int(x), side - 2), min(int(y), side - 2)
            right_share, lower_share = x - left, y - top
            upper = (1 - right_share) * image[top, left] + right_share * image[top, left + 1]
            lower = (1 - right_share) * image[top + 1, left] + right_share * image[top + 1, left + 1]
            result[row, column] = (1 - lower_share) * upper + lower_share * lower
    return result


def test_parameters_that_change_nothing_give_the_same_picture() -> None:
    images = pictures(side=96)
    result = apply(images, unchanged(3))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, images.float(), rtol=0, atol=0.02)


def test_the_recipe_none_gives_the_same_picture() -> None:
    images = pictures()
    result = apply(images, sample(AUGMENTATIONS["none"], 3, torch.Generator().manual_seed(1)))
    torch.testing.assert_close(result, images.float(), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "change",
    [
        {"angle": 0.3},
        {"angle": -0.2, "shear": 0.1},
        {"zoom": 1.25},
        {"zoom": 0.75},
        {"shift_x": 0.11, "shift_y": -0.07},
        {"mirrored": 1.0, "angle": 0.3, "shift_x": 0.1},
        {"mirrored": 1.0, "angle": -0.4, "shear": 0.05, "zoom": 0.9, "shift_x": 0.13, "shift_y": 0.02},
    ],
    ids=lambda change: "-".join(change),
)
def test_moving_pixels_equals_a_loop_over_pixels(change: dict[str, float]) -> None:
    images = pictures(1)
    parameters = unchanged(1, **change)
    expected = warp_pixel_by_pixel(images[0].numpy().astype(float), parameters)
    np.testing.assert_allclose(apply(images, parameters)[0].numpy(), expected, atol=0.02)


def test_a_quarter_turn_is_a_quarter_turn() -> None:
    images = pictures()
    turned = apply(images, unchanged(3, angle=math.pi / 2))
    torch.testing.assert_close(turned, images.float().rot90(1, dims=(1, 2)), rtol=0, atol=0.02)


def test_a_mirror_image_swaps_left_and_right_only() -> None:
    images = pictures()
    torch.testing.assert_close(apply(images, unchanged(3, mirrored=1.0)), images.float().flip(2), rtol=0, atol=0.02)


def test_a_shift_is_a_share_of_the_side_and_repeats_the_border() -> None:
    images = pictures()
    moved = apply(images, unchanged(3, shift_x=4 / SIDE))  # the picture moves to the left by 4 px
    torch.testing.assert_close(moved[:, :, :-4], images[:, :, 4:].float(), rtol=0, atol=0.02)
    torch.testing.assert_close(moved[:, :, -4:], images[:, :, -1:].float().expand(-1, -1, 4), rtol=0, atol=0.02)
    moved = apply(images, unchanged(3, shift_y=-3 / SIDE))  # and down by 3 px
    torch.testing.assert_close(moved[:, 3:], images[:, :-3].float(), rtol=0, atol=0.02)
    torch.testing.assert_close(moved[:, :3], images[:, :1].float().expand(-1, 3, -1), rtol=0, atol=0.02)


def test_a_zoom_above_one_enlarges() -> None:
    images = torch.zeros(1, 40, 40)
    images[:, 15:25, 15:25] = 255
    enlarged = apply(images, unchanged(1, zoom=1.5))
    assert float(enlarged.sum() / images.sum()) == pytest.approx(1.5**2, rel=0.05)


def test_matrices_of_unchanged_parameters_are_identities() -> None:
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).expand(2, -1, -1)
    torch.testing.assert_close(affine_matrices(unchanged(2)), expected)


def test_gamma_contrast_and_brightness_follow_their_formulas() -> None:
    images = pictures(1)
    result = apply(images, unchanged(1, gamma=0.8, contrast=1.1, brightness=0.05))[0]
    for row in range(SIDE):
        for column in range(SIDE):
            grey = 255 * (int(images[0, row, column]) / 255) ** 0.8
            grey = (grey - 127.5) * 1.1 + 127.5 + 0.05 * 255
            assert float(result[row, column]) == pytest.approx(min(max(grey, 0), 255), abs=0.02)


def test_results_stay_within_the_grey_scale() -> None:
    result = apply(pictures(), unchanged(3, contrast=3.0, brightness=0.4))
    assert (float(result.min()), float(result.max())) == (0.0, 255.0)


def test_an_erased_rectangle_has_the_mean_of_its_image_and_the_stated_area() -> None:
    images = pictures(2, side=100)
    parameters = unchanged(2, erased=1.0)
    parameters = dataclasses.replace(parameters, box=torch.tensor([[0.0, 0.5, 0.0, 0.0], [1.0, 0.5, 1.0, 1.0]]))
    before, after = apply(images, unchanged(2)), apply(images, parameters)
    for index, share in enumerate((0.02, 0.10)):
        changed = after[index] != before[index]
        assert float(changed.float().mean()) == pytest.approx(share, rel=0.05)
        rows, columns = torch.nonzero(changed, as_tuple=True)
        assert int(changed.sum()) == (int(rows.max() - rows.min()) + 1) * (int(columns.max() - columns.min()) + 1)
        torch.testing.assert_close(after[index][changed].unique(), before[index].mean().reshape(1))
    assert bool((after[0] != before[0])[0, 0])  # at the top left, and at the bottom right
    assert bool((after[1] != before[1])[-1, -1])


def test_only_the_chosen_images_are_erased() -> None:
    images = pictures()
    parameters = dataclasses.replace(unchanged(3), erased=torch.tensor([0.0, 1.0, 0.0]))
    differs = (apply(images, parameters) != apply(images, unchanged(3))).flatten(1).any(dim=1)
    assert differs.tolist() == [False, True, False]


def test_a_coarse_image_is_the_image_reduced_and_enlarged_again() -> None:
    image = pictures(1, side=32)
    after = apply(image, unchanged(1, coarseness=0.25))[0]
    # A reduction to a quarter with antialiasing is a mean under a triangle four pixels wide to either side.
    weights = np.maximum(0, 1 - np.abs(np.arange(32) + 0.5 - (np.arange(8)[:, None] + 0.5) * 4) / 4)
    weights /= weights.sum(1, keepdims=True)
    small = weights @ image[0].numpy().astype(float) @ weights.T
    position = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7)
    left = np.minimum(position.astype(int), 6)
    enlarge = np.zeros((32, 8))
    enlarge[np.arange(32), left], enlarge[np.arange(32), left + 1] = 1 - (position - left), position - left
    np.testing.assert_allclose(after.numpy(), enlarge @ small @ enlarge.T, atol=1e-3)


def test_only_the_chosen_images_are_coarse() -> None:
    images = pictures()
    parameters = dataclasses.replace(unchanged(3), coarseness=torch.tensor([1.0, 0.5, 1.0]))
    differs = (apply(images, parameters) != apply(images, unchanged(3))).flatten(1).any(dim=1)
    assert differs.tolist() == [False, True, False]


def test_as_many_images_are_coarse_as_stated_and_none_more_than_the_limit() -> None:
    coarseness = sample(AUGMENTATIONS["wide"], 4000, torch.Generator().manual_seed(0)).coarseness
    assert float((coarseness < 1).float().mean()) == pytest.approx(AUGMENTATIONS["wide"].coarsen, abs=0.03)
    assert COARSEST <= float(coarseness.min()) < COARSEST + 0.01


def test_each_image_of_a_batch_has_parameters_of_its_own() -> None:
    image = pictures(1).expand(8, -1, -1)
    result = apply(image, sample(AUGMENTATIONS["strong"], 8, torch.Generator().manual_seed(0)))
    assert len({picture.numpy().tobytes() for picture in result}) == 8


def test_a_part_of_the_batch_is_augmented_as_within_the_whole() -> None:
    images = pictures(7)
    parameters = sample(AUGMENTATIONS["strong"], 7, torch.Generator().manual_seed(3))
    whole = apply(images, parameters)
    parts = [apply(images[part], parameters[part]) for part in (slice(0, 3), slice(3, 4), slice(4, 7))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-4)


def test_the_same_generator_gives_the_same_augmentation() -> None:
    first, second = (sample(AUGMENTATIONS["strong"], 5, torch.Generator().manual_seed(11)) for _ in range(2))
    for field in dataclasses.fields(Parameters):
        assert torch.equal(getattr(first, field.name), getattr(second, field.name))
    assert torch.equal(apply(pictures(5), first), apply(pictures(5), second))


def test_sampling_takes_as_many_numbers_whatever_the_ranges_are() -> None:
    generators = [torch.Generator().manual_seed(5) for _ in AUGMENTATIONS]
    for generator, augmentation in zip(generators, AUGMENTATIONS.values(), strict=True):
        sample(augmentation, 4, generator)
    assert len({generator.get_state().numpy().tobytes() for generator in generators}) == 1


def test_bytes_and_floats_of_the_same_picture_give_the_same_result() -> None:
    parameters = sample(AUGMENTATIONS["strong"], 3, torch.Generator().manual_seed(2))
    assert torch.equal(apply(pictures(), parameters), apply(pictures().float(), parameters))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_input_stays_as_it_was(dtype: torch.dtype) -> None:
    images = pictures().to(dtype)
    kept = images.clone()
    apply(images, unchanged(3, erased=1.0, brightness=0.1))
    assert torch.equal(images, kept)


def test_drawn_parameters_fill_their_ranges_and_stay_within() -> None:
    augmentation = AUGMENTATIONS["strong"]
    drawn = sample(augmentation, 4000, torch.Generator().manual_seed(0))
    for values, limit in (
        (drawn.shift_x, augmentation.shift),
        (drawn.shift_y, augmentation.shift),
        (drawn.angle, math.radians(augmentation.rotation_degrees)),
        (drawn.shear, augmentation.shear),
        (drawn.zoom - 1, augmentation.zoom),
        (drawn.gamma.log(), augmentation.gamma),
        (drawn.contrast - 1, augmentation.contrast),
        (drawn.brightness, augmentation.brightness),
    ):
        assert float(values.abs().max()) <= limit * 1.0001
        assert float(values.min()) < -0.99 * limit
        assert float(values.max()) > 0.99 * limit
        assert abs(float(values.mean())) < 0.05 * limit
    assert float(drawn.mirrored.mean()) == pytest.approx(augmentation.flip, abs=0.03)
    assert float(drawn.erased.mean()) == pytest.approx(augmentation.erase, abs=0.03)


def test_the_reference_augmentation_is_the_table_of_the_reference_project() -> None:
    # flip; height and width shift 15 %; rotation +-5 degrees; shear 1 %; zoom +-25 %; nothing else
    assert AUGMENTATIONS["reference"] == Augmentation(
        flip=0.5, shift=0.15, rotation_degrees=5.0, shear=0.01, zoom=0.25, gamma=0, contrast=0, brightness=0, erase=0
    )


def test_nothing_is_augmented_by_default() -> None:
    assert AUGMENTATIONS["none"] == Augmentation()
    assert set(dataclasses.astuple(Augmentation())) == {0.0}
