import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from boneage_hf.errors import InputError
from boneage_hf.image_processing_boneage import (
    BoneAgeImageProcessor,
    has_light_background,
    polarity_score,
    stretch_contrast,
)

AIR, SOFT_TISSUE, BONE = 20, 90, 170


def drawn_hand(
    *, height: int = 300, width: int = 300, levels: tuple[int, int, int] = (AIR, SOFT_TISSUE, BONE)
) -> np.ndarray:
    """uint8 (height, width): a palm, five fingers and a forearm of soft tissue with thin bones inside, on air."""
    air, soft_tissue, bone = levels
    image = Image.new("L", (300, 300), air)
    draw = ImageDraw.Draw(image)
    tips = [(60, 130), (105, 55), (145, 40), (185, 55), (220, 90)]
    draw.ellipse((95, 125, 205, 245), fill=soft_tissue)
    draw.rectangle((120, 220, 180, 299), fill=soft_tissue)
    for tip in tips:
        draw.line(((150, 195), tip), fill=soft_tissue, width=24)
    for tip in tips:
        draw.line(((150, 205), tip), fill=bone, width=9)
    draw.line(((138, 225), (138, 299)), fill=bone, width=12)
    draw.line(((162, 225), (162, 299)), fill=bone, width=12)
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def untouched(**settings: object) -> BoneAgeImageProcessor:
    """A processor whose steps are all off or without effect, unless given in ``settings``."""
    quiet: dict = {"size": {"height": 32, "width": 32}, "correct_polarity": False, "stretch_percentiles": None}
    return BoneAgeImageProcessor(**(quiet | settings))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- polarity ---------------------------------------------------------------------------------------------------


def test_bright_bones_on_dark_are_left_alone() -> None:
    assert not has_light_background(drawn_hand())


def test_dark_bones_on_a_light_ground_are_recognised() -> None:
    assert has_light_background(255 - drawn_hand())


def test_a_light_ground_with_still_brighter_bones_is_not_inverted() -> None:
    assert not has_light_background(drawn_hand(levels=(180, 205, 240)))


def test_a_hand_of_six_grey_levels_is_decided_both_ways() -> None:
    faint = drawn_hand(levels=(100, 103, 105))
    assert not has_light_background(faint)
    assert has_light_background(255 - faint)


@pytest.mark.parametrize("border", [0, 255])
def test_a_collimation_frame_of_either_kind_does_not_decide(border: int) -> None:
    framed = np.pad(drawn_hand(), 40, constant_values=border)
    assert not has_light_background(framed)
    assert has_light_background(255 - framed)


def test_a_lead_marker_does_not_decide() -> None:
    marked = drawn_hand(levels=(100, 110, 120)).copy()
    marked[200:250, 20:60] = 255
    assert not has_light_background(marked)
    inverted = 255 - drawn_hand(levels=(100, 110, 120))
    inverted[200:250, 20:60] = 255  # burnt in after inversion
    assert has_light_background(inverted)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_turned_hand_is_decided_both_ways(turns: int) -> None:
    turned = np.rot90(drawn_hand(), turns)
    assert not has_light_background(turned)
    assert has_light_background(255 - turned)


@pytest.mark.parametrize(("height", "width"), [(2000, 1500), (1500, 2000), (300, 100), (100, 300), (40, 40)])
def test_the_decision_does_not_depend_on_size_or_shape(height: int, width: int) -> None:
    hand = drawn_hand(height=height, width=width)
    assert not has_light_background(hand)
    assert has_light_background(255 - hand)


@pytest.mark.parametrize("shape", [(299, 299), (100, 100), (37, 211), (1, 1), (3, 250)])
def test_the_score_of_a_negative_is_the_negated_score(shape: tuple[int, int]) -> None:
    grey = noise(*shape)
    assert polarity_score(255 - grey) == -polarity_score(grey)


def test_a_constant_picture_has_score_zero_and_is_not_inverted() -> None:
    for level in (0, 128, 255):
        grey = np.full((50, 60), level, dtype=np.uint8)
        assert polarity_score(grey) == 0
        assert not has_light_background(grey)


def slow_polarity_score(grey: np.ndarray) -> float:
    """The docstring of `polarity_score` word by word, in plain loops and by definition, for pictures up to 299 px."""
    side, margin = 100, 12
    signed = Image.fromarray(grey.astype(np.float32) * 2 - 255)
    thumbnail = np.asarray(signed.resize((side, side), Image.Resampling.BILINEAR)).astype(float)

    def window(values: np.ndarray, pick: object) -> np.ndarray:
        out = np.empty_like(values)
        for row in range(side):
            for column in range(side):
                part = values[max(0, row - 2) : row + 3, max(0, column - 2) : column + 3]
                out[row, column] = part.min() if pick is min else part.max()
        return out

    opened = window(window(thumbnail, min), max)
    closed = window(window(thumbnail, max), min)
    rounded = np.rint(thumbnail)
    ordered = np.sort(rounded.ravel())
    below = np.searchsorted(ordered, rounded, side="left")
    up_to = np.searchsorted(ordered, rounded, side="right")
    ranks = ((below + up_to) / 2) / side**2 - 0.5

    def blur(values: np.ndarray, sigma: float) -> np.ndarray:
        out = values
        for axis in (0, 1):
            moved = np.moveaxis(out, axis, 0)
            blurred = np.empty_like(moved)
            for row in range(side):
                weights = np.array([np.exp(-((row - other) ** 2) / (2 * sigma**2)) for other in range(side)])
                blurred[row] = (weights[:, None] * moved).sum(0) / weights.sum()
            out = np.moveaxis(blurred, 0, axis)
        return out

    band = blur(ranks, 2) - blur(ranks, 4)
    inside = range(margin, side - margin)
    magnitude = np.mean([abs(band[row, column]) for row in inside for column in inside])
    difference = total = hand = weight_sum = 0.0
    for row in inside:
        for column in inside:
            weight = np.exp(-((row - 49.5) ** 2 + (column - 49.5) ** 2) / (2 * 17.5**2))
            bright, dark = thumbnail[row, column] - opened[row, column], closed[row, column] - thumbnail[row, column]
            difference += weight * (bright - dark)
            total += weight * (bright + dark)
            hand += weight * min(1.0, max(-1.0, band[row, column] / magnitude))
            weight_sum += weight
    return (difference / total + 2 * hand / weight_sum) / 2


def test_the_score_agrees_with_a_slow_reading_of_its_definition() -> None:
    hand = drawn_hand(height=250, width=180)
    for grey in (hand, np.clip(hand + noise(250, 180) // 8, 0, 255).astype(np.uint8)):
        assert polarity_score(grey) == pytest.approx(slow_polarity_score(grey), abs=1e-9)


def test_prepare_gives_the_same_for_a_picture_and_its_negative() -> None:
    processor = BoneAgeImageProcessor(size={"height": 64, "width": 64}, stretch_percentiles=None)
    hand = drawn_hand(height=64, width=64)
    np.testing.assert_array_equal(processor.prepare(255 - hand), hand)
    np.testing.assert_array_equal(processor.prepare(hand), hand)


def test_correct_polarity_off_keeps_a_light_background() -> None:
    light = 255 - drawn_hand(height=32, width=32)
    np.testing.assert_array_equal(untouched(correct_polarity=False).prepare(light), light)


# --- contrast ---------------------------------------------------------------------------------------------------


def slow_stretch(grey: np.ndarray, low: float, high: float) -> np.ndarray:
    bottom, top = np.percentile(grey, low), np.percentile(grey, high)
    out = np.empty_like(grey)
    for row in range(grey.shape[0]):
        for column in range(grey.shape[1]):
            value = (float(grey[row, column]) - bottom) / (top - bottom) * 255
            out[row, column] = int(min(255.0, max(0.0, value)) + 0.5)
    return out


@pytest.mark.parametrize(("low", "high"), [(1, 99), (0, 100), (2.5, 90.3), (40, 60)])
@pytest.mark.parametrize("seed", range(5))
def test_stretch_agrees_with_percentiles_on_a_plain_loop(low: float, high: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    grey = np.clip(rng.normal(90, 25, (31, 17 + seed)), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(stretch_contrast(grey, low, high), slow_stretch(grey, low, high))


def test_stretch_of_few_grey_levels_reaches_both_ends() -> None:
    stretched = stretch_contrast(drawn_hand(levels=(100, 110, 120)), 1, 99)
    assert (stretched.min(), stretched.max()) == (0, 255)


def test_a_constant_picture_is_not_stretched() -> None:
    for level in (0, 77, 255):
        grey = np.full((9, 11), level, dtype=np.uint8)
        np.testing.assert_array_equal(stretch_contrast(grey, 1, 99), grey)


def test_a_picture_constant_between_the_percentiles_is_not_stretched() -> None:
    grey = np.full((100, 100), 40, dtype=np.uint8)
    grey[0, :50] = 200  # half a percent
    np.testing.assert_array_equal(stretch_contrast(grey, 1, 99), grey)


def test_stretching_comes_after_inversion_and_before_resizing() -> None:
    hand = drawn_hand(height=200, width=160)
    processor = BoneAgeImageProcessor(size={"height": 48, "width": 56}, stretch_percentiles=[5, 80])
    stretched = Image.fromarray(stretch_contrast(hand, 5, 80))
    expected = np.asarray(stretched.resize((56, 48), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(processor.prepare(255 - hand), expected)


@pytest.mark.parametrize(("low", "high"), [(99, 1), (50, 50), (-1, 99), (1, 101), (float("nan"), 99)])
def test_percentiles_out_of_order_are_refused(low: float, high: float) -> None:
    with pytest.raises(InputError, match="stretch_percentiles must be"):
        stretch_contrast(noise(8, 8), low, high)


# --- size -------------------------------------------------------------------------------------------------------


def test_resizing_is_pil_bilinear() -> None:
    grey = noise(90, 130)
    expected = np.asarray(Image.fromarray(grey).resize((40, 60), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(untouched(size={"height": 60, "width": 40}).prepare(grey), expected)


def test_resizing_averages_over_what_it_leaves_out() -> None:
    stripes = np.tile(np.array([0, 200], dtype=np.uint8), (320, 160))
    assert np.abs(untouched().prepare(stripes)[:, 1:-1].astype(int) - 100).max() <= 3


def test_every_image_goes_through_the_source_size() -> None:
    grey = noise(200, 120)
    small = Image.fromarray(grey).resize((50, 50), Image.Resampling.BILINEAR)
    expected = np.asarray(small.resize((32, 32), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(untouched(source_size=50).prepare(grey), expected)


def test_an_image_of_the_source_size_and_its_original_give_the_same() -> None:
    original = drawn_hand(height=600, width=420)
    copy = np.asarray(Image.fromarray(original).resize((99, 99), Image.Resampling.BILINEAR))
    processor = BoneAgeImageProcessor(size={"height": 128, "width": 128}, source_size=99)
    np.testing.assert_array_equal(processor.prepare(original), processor.prepare(copy))


def test_an_image_that_has_every_size_already_is_not_changed() -> None:
    grey = noise(32, 32)
    np.testing.assert_array_equal(untouched(source_size=32).prepare(grey), grey)


@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [
        ((200, 100), slice(0, 64), slice(16, 48)),
        ((100, 200), slice(16, 48), slice(0, 64)),
        ((100, 100), slice(0, 64), slice(0, 64)),
        ((64, 61), slice(0, 64), slice(1, 62)),  # odd remainder: the extra column is on the right
        ((61, 64), slice(1, 62), slice(0, 64)),
        ((16, 8), slice(0, 64), slice(16, 48)),  # smaller than the target: enlarged
        ((2000, 3), slice(0, 64), slice(31, 32)),  # never narrower than one pixel
    ],
)
def test_pad_keeps_the_aspect_ratio_and_centres_on_black(shape: tuple[int, int], rows: slice, columns: slice) -> None:
    prepared = untouched(size={"height": 64, "width": 64}, resize_mode="pad").prepare(np.full(shape, 200, np.uint8))
    expected = np.zeros((64, 64), dtype=np.uint8)
    expected[rows, columns] = 200
    np.testing.assert_array_equal(prepared, expected)


def test_pad_fills_with_black_when_the_background_was_light() -> None:
    processor = BoneAgeImageProcessor(size={"height": 96, "width": 96}, resize_mode="pad")
    hand = drawn_hand(height=300, width=200)
    prepared = processor.prepare(255 - hand)
    np.testing.assert_array_equal(prepared, processor.prepare(hand))
    assert prepared[:, :16].max() == 0
    assert prepared[:, 80:].max() == 0


def test_prepare_gives_uint8_that_may_be_written_to() -> None:
    for mode in ("squash", "pad"):
        processor = BoneAgeImageProcessor(size={"height": 48, "width": 32}, resize_mode=mode)
        prepared = processor.prepare(drawn_hand())
        assert prepared.shape == (48, 32)
        assert prepared.dtype == np.uint8
        prepared[0, 0] = 1


def test_prepare_does_not_change_its_input() -> None:
    grey = 255 - drawn_hand()
    before = grey.copy()
    BoneAgeImageProcessor().prepare(grey)
    np.testing.assert_array_equal(grey, before)


# --- containers -------------------------------------------------------------------------------------------------


def stored(image: Image.Image, file_format: str) -> Image.Image:
    """``image`` written to a file of that format and opened again."""
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return Image.open(io.BytesIO(buffer.getvalue()))


def containers() -> dict[str, Image.Image | np.ndarray]:
    grey = drawn_hand(height=120, width=90)
    image = Image.fromarray(grey)
    return {
        "PIL L": image,
        "PIL RGB": image.convert("RGB"),
        "PIL RGBA, opaque": image.convert("RGBA"),
        "PIL LA, opaque": image.convert("LA"),
        "PIL P": image.convert("P"),
        "PNG L": stored(image, "PNG"),
        "PNG RGB": stored(image.convert("RGB"), "PNG"),
        "PNG RGBA": stored(image.convert("RGBA"), "PNG"),
        "PNG P": stored(image.convert("P"), "PNG"),
        "TIFF L": stored(image, "TIFF"),
        "BMP RGB": stored(image.convert("RGB"), "BMP"),
        "array (H, W)": grey,
        "array (H, W, 1)": grey[..., None],
        "array (H, W, 3)": np.repeat(grey[..., None], 3, axis=2),
        "array, not contiguous": np.repeat(grey, 2, axis=1)[:, ::2],
        "array, read only": np.frombuffer(grey.tobytes(), dtype=np.uint8).reshape(grey.shape),
    }


@pytest.mark.parametrize("container", containers())
def test_the_same_picture_gives_the_same_tensor_whatever_holds_it(container: str) -> None:
    processor = BoneAgeImageProcessor(size={"height": 64, "width": 64}, source_size=80)
    expected = processor(drawn_hand(height=120, width=90), return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(containers()[container], return_tensors="pt")["pixel_values"], expected)


def test_colour_becomes_luma() -> None:
    colours = noise(32, 32, 3)
    luma = colours.astype(float) @ np.array([0.299, 0.587, 0.114])
    assert np.abs(untouched().prepare(colours) - luma).max() <= 0.51


@pytest.mark.parametrize(
    "image",
    [
        noise(40, 40).astype(np.uint16),
        noise(40, 40).astype(np.float32) / 255,
        noise(40, 40) > 100,
        noise(40, 40, 4),
        noise(40),
        noise(2, 40, 40, 3),
        Image.fromarray(noise(40, 40).astype(np.uint16)),
        Image.fromarray(noise(40, 40).astype(np.float32)),
        Image.fromarray(noise(40, 40).astype(np.int32)),
        Image.fromarray(noise(40, 40, 3)).convert("CMYK"),
        torch.zeros(40, 40, dtype=torch.uint8),
        "hand.png",
        None,
    ],
    ids=[
        *("16 bit", "float", "bool", "four channels", "one dimension", "a batch"),
        *("PIL 16 bit", "PIL float", "PIL 32 bit", "PIL CMYK", "tensor", "path", "nothing"),
    ],
)
def test_anything_but_8_bit_pixels_is_refused_with_the_cure(image: object) -> None:
    with pytest.raises(InputError, match=r"read it with boneage_hf\.radiograph\.read, which windows it"):
        BoneAgeImageProcessor().prepare(image)  # type: ignore[arg-type]


def test_a_path_is_refused_without_being_repeated() -> None:
    with pytest.raises(InputError) as caught:
        BoneAgeImageProcessor().preprocess(["/data/DOE_JANE.png"])
    assert "DOE" not in str(caught.value)


def test_transparent_pixels_are_refused() -> None:
    image = Image.fromarray(drawn_hand()).convert("RGBA")
    image.putpixel((3, 4), (0, 0, 0, 100))
    with pytest.raises(InputError, match="transparent pixels"):
        BoneAgeImageProcessor().prepare(image)


@pytest.mark.parametrize("shape", [(0, 10), (10, 0), (0, 0, 3)])
def test_an_image_without_pixels_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="no pixels"):
        BoneAgeImageProcessor().prepare(np.zeros(shape, dtype=np.uint8))


@pytest.mark.parametrize("grey", [noise(8, 8, 3), noise(8, 8).astype(float), [[1, 2]], np.zeros((0, 3), np.uint8)])
def test_the_module_functions_refuse_what_is_not_a_grey_plane(grey: object) -> None:
    with pytest.raises(InputError, match=r"uint8 array of shape \(H, W\)"):
        has_light_background(grey)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"uint8 array of shape \(H, W\)"):
        stretch_contrast(grey, 1, 99)  # type: ignore[arg-type]


# --- pixel values -----------------------------------------------------------------------------------------------


def test_pixel_values_are_standardised_per_channel() -> None:
    processor = untouched(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.25, 1.0])
    prepared = noise(2, 5, 7)
    values = processor.to_pixel_values(torch.from_numpy(prepared))
    assert values.shape == (2, 3, 5, 7)
    assert values.dtype == torch.float32
    for channel, (mean, std) in enumerate([(0.1, 0.5), (0.2, 0.25), (0.3, 1.0)]):
        np.testing.assert_allclose(values[:, channel].numpy(), (prepared / 255 - mean) / std, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_pixel_values_of_floating_point_levels_equal_those_of_uint8(dtype: torch.dtype) -> None:
    prepared = torch.from_numpy(noise(2, 6, 6))
    processor = BoneAgeImageProcessor()
    assert torch.equal(processor.to_pixel_values(prepared.to(dtype)), processor.to_pixel_values(prepared))


def test_pixel_values_keep_levels_between_whole_numbers() -> None:
    processor = untouched(image_mean=[0, 0, 0], image_std=[1, 1, 1])
    values = processor.to_pixel_values(torch.full((1, 2, 2), 127.5))
    np.testing.assert_allclose(values.numpy(), 0.5, atol=1e-7)


def test_pixel_values_stay_on_the_device_of_their_input() -> None:
    values = BoneAgeImageProcessor().to_pixel_values(torch.empty(4, 8, 9, dtype=torch.uint8, device="meta"))
    assert (values.device.type, values.shape) == ("meta", (4, 3, 8, 9))


@pytest.mark.parametrize(
    "prepared", [torch.zeros(8, 8), torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.int64), noise(1, 8, 8)]
)
def test_pixel_values_refuse_other_shapes_and_types(prepared: object) -> None:
    with pytest.raises(InputError, match="Prepared images must be"):
        BoneAgeImageProcessor().to_pixel_values(prepared)  # type: ignore[arg-type]


def test_preprocess_is_prepare_and_to_pixel_values() -> None:
    processor = BoneAgeImageProcessor(size={"height": 64, "width": 48})
    hands = [drawn_hand(), 255 - drawn_hand(height=200, width=90)]
    prepared = torch.from_numpy(np.stack([processor.prepare(hand) for hand in hands]))
    expected = processor.to_pixel_values(prepared)
    assert torch.equal(processor(hands, return_tensors="pt")["pixel_values"], expected)
    assert torch.equal(processor.preprocess(tuple(hands), return_tensors="pt")["pixel_values"], expected)


def test_return_tensors_chooses_tensor_array_or_list() -> None:
    processor = BoneAgeImageProcessor(size={"height": 32, "width": 32})
    tensor = processor(drawn_hand(), return_tensors="pt")["pixel_values"]
    array = processor(drawn_hand(), return_tensors="np")["pixel_values"]
    listed = processor(drawn_hand())["pixel_values"]
    assert isinstance(tensor, torch.Tensor)
    assert tensor.shape == (1, 3, 32, 32)
    assert isinstance(array, np.ndarray)
    assert isinstance(listed, list)
    np.testing.assert_array_equal(array, tensor.numpy())
    np.testing.assert_array_equal(listed[0], array[0])


def test_another_kind_of_tensor_is_refused() -> None:
    with pytest.raises(InputError, match="return_tensors must be"):
        BoneAgeImageProcessor()(drawn_hand(), return_tensors="tf")


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(InputError, match="give at least one"):
        BoneAgeImageProcessor()([], return_tensors="pt")


# --- settings ---------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_an_imagenet_backbone_at_384() -> None:
    settings = BoneAgeImageProcessor().to_dict()
    assert settings == {
        "size": {"height": 384, "width": 384},
        "source_size": None,
        "source_jpeg_quality": None,
        "resize_mode": "squash",
        "correct_polarity": True,
        "stretch_percentiles": [1.0, 99.0],
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "image_processor_type": "BoneAgeImageProcessor",
    }


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"size": 384}, "size must be a dict"),
        ({"size": {"height": 384}}, "size must be a dict"),
        ({"size": {"shortest_edge": 384}}, "size must be a dict"),
        ({"size": {"height": 384, "width": 8}}, 'size\\["width"\\] must be a whole number'),
        ({"size": {"height": 384.0, "width": 384}}, 'size\\["height"\\] must be a whole number'),
        ({"size": {"height": True, "width": 384}}, 'size\\["height"\\] must be a whole number'),
        ({"source_size": 0}, "source_size must be a whole number"),
        ({"source_size": "299"}, "source_size must be a whole number"),
        ({"source_size": 10**6}, "source_size must be a whole number"),
        ({"resize_mode": "crop"}, "resize_mode must be"),
        ({"resize_mode": "pad", "source_size": 299}, "set source_size to None"),
        ({"correct_polarity": 1}, "correct_polarity must be True or False"),
        ({"correct_polarity": None}, "correct_polarity must be True or False"),
        ({"stretch_percentiles": [99, 1]}, "stretch_percentiles must be"),
        ({"stretch_percentiles": [1]}, "stretch_percentiles must be"),
        ({"stretch_percentiles": 1}, "stretch_percentiles must be"),
        ({"image_mean": [0.5]}, "image_mean must be a list of 3"),
        ({"image_mean": [123.7, 116.3, 103.5]}, r"image_mean must lie within \[0, 1\]"),
        ({"image_mean": [0.5, 0.5, float("inf")]}, "image_mean must be a list of 3 finite"),
        ({"image_std": [0.2, 0.2, 0.0]}, "image_std must lie above 0"),
        ({"image_std": "0.2"}, "image_std must be a list of 3"),
        ({"do_resize": True}, "Unknown argument of BoneAgeImageProcessor: do_resize; it takes size"),
    ],
)
def test_a_setting_out_of_range_is_refused_in_one_sentence(settings: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        BoneAgeImageProcessor(**settings)
    assert "\n" not in str(caught.value)


ODD_SETTINGS: dict = {
    "size": {"height": 96, "width": 64},
    "source_size": 111,
    "resize_mode": "squash",
    "correct_polarity": False,
    "stretch_percentiles": [0.5, 97.5],
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
}
SETTINGS_OF_NONE: dict = ODD_SETTINGS | {"source_size": None, "stretch_percentiles": None, "resize_mode": "pad"}


@pytest.mark.parametrize("settings", [ODD_SETTINGS, SETTINGS_OF_NONE], ids=["odd", "none"])
def test_every_setting_survives_saving_and_loading(settings: dict, tmp_path: Path) -> None:
    BoneAgeImageProcessor(**settings).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert {name: written[name] for name in settings} == settings
    loaded = BoneAgeImageProcessor.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in settings} == settings
    assert loaded.to_dict() == BoneAgeImageProcessor(**settings).to_dict()


def test_a_setting_may_be_overridden_when_loading(tmp_path: Path) -> None:
    BoneAgeImageProcessor(source_size=299).save_pretrained(tmp_path)
    loaded = BoneAgeImageProcessor.from_pretrained(tmp_path, source_size=None, resize_mode="pad")
    assert (loaded.source_size, loaded.resize_mode) == (None, "pad")


def test_an_override_out_of_range_is_refused_when_loading(tmp_path: Path) -> None:
    BoneAgeImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="source_size must be a whole number"):
        BoneAgeImageProcessor.from_pretrained(tmp_path, source_size=-1)


def test_an_unknown_setting_in_a_saved_file_is_refused(tmp_path: Path) -> None:
    BoneAgeImageProcessor().save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_center_crop": True}))
    with pytest.raises(InputError, match="do_center_crop"):
        BoneAgeImageProcessor.from_pretrained(tmp_path)


TRAVEL = """
import sys
import numpy as np
from transformers import AutoImageProcessor

folder, again, image, out = sys.argv[1:]
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
assert "boneage_hf" not in sys.modules, "the folder must not need the package"
processor.save_pretrained(again)
processor = AutoImageProcessor.from_pretrained(again, trust_remote_code=True)
try:
    processor.prepare(np.zeros((4, 4)))
except ValueError as error:
    assert "radiograph.read" in str(error)
else:
    raise SystemExit("floating point pixels were taken")
np.save(out, processor(np.load(image), return_tensors="np")["pixel_values"])
"""


@pytest.mark.slow
def test_a_saved_folder_carries_its_code_and_gives_the_same_tensor_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BoneAgeImageProcessor, "_auto_class", None)
    BoneAgeImageProcessor.register_for_auto_class()
    processor = BoneAgeImageProcessor(size={"height": 64, "width": 64}, source_size=99)
    processor.save_pretrained(tmp_path / "saved")
    hand = 255 - drawn_hand()
    np.save(tmp_path / "hand.npy", hand)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    arguments = [str(tmp_path / name) for name in ("saved", "again", "hand.npy", "out.npy")]
    # -P and another working directory: the checkout is not importable, unless the package is installed, which the
    # script looks for itself.
    done = subprocess.run(
        [sys.executable, "-P", "-c", TRAVEL, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), processor(hand, return_tensors="np")["pixel_values"])
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [
        "errors.py",
        "image_processing_boneage.py",
        "preprocessor_config.json",
    ]


# --- the real data, where a developer has them ------------------------------------------------------------------


@pytest.mark.development
@pytest.mark.skipif("BONEAGE_RSNA_DIR" not in os.environ, reason="BONEAGE_RSNA_DIR names no copy of the RSNA images")
def test_few_rsna_images_are_called_light() -> None:
    paths = sorted((Path(os.environ["BONEAGE_RSNA_DIR"]) / "boneage-training-dataset").glob("*.*"))
    chosen = np.random.default_rng(0).choice(len(paths), min(300, len(paths)), replace=False)
    light = 0
    for index in chosen:
        with Image.open(paths[index]) as image:
            light += has_light_background(np.asarray(image.convert("L")))
    assert light <= 1  # bones are bright in all of them; 3 of all 12,611 are called light by mistake


# --- the storage of the copies --------------------------------------------------------------------------------------


def noisy_picture(height: int, width: int) -> Image.Image:
    generator = np.random.default_rng(5)
    rows = np.linspace(20, 200, height)[:, None] + generator.normal(0, 12, (height, width))
    return Image.fromarray(np.clip(rows, 0, 255).astype(np.uint8))


def copy_of(image: Image.Image, *, side: int, quality: int) -> Image.Image:
    """What someone stored who reduced the picture and wrote a JPEG file."""
    buffer = io.BytesIO()
    image.resize((side, side), Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def test_an_original_gives_the_very_pixels_of_its_stored_copy() -> None:
    processor = BoneAgeImageProcessor(size={"height": 64, "width": 64}, source_size=99, source_jpeg_quality=92)
    original = noisy_picture(400, 300)
    copy = copy_of(original, side=99, quality=92)
    assert np.array_equal(processor.prepare(original), processor.prepare(copy))


def test_without_that_step_the_traces_of_jpeg_remain_a_difference() -> None:
    processor = BoneAgeImageProcessor(size={"height": 64, "width": 64}, source_size=99)
    original = noisy_picture(400, 300)
    copy = copy_of(original, side=99, quality=92)
    assert not np.array_equal(processor.prepare(original), processor.prepare(copy))


def test_an_image_of_the_source_size_is_not_stored_again() -> None:
    image = noisy_picture(99, 99)
    size = {"height": 99, "width": 99}
    with_step = BoneAgeImageProcessor(size=size, source_size=99, source_jpeg_quality=30)
    without = BoneAgeImageProcessor(size=size, source_size=99)
    assert np.array_equal(with_step.prepare(image), without.prepare(image))


@pytest.mark.parametrize("quality", [0, 101, 92.0, True, "92"])
def test_a_jpeg_quality_that_is_none_is_refused(quality: object) -> None:
    with pytest.raises(InputError, match="source_jpeg_quality"):
        BoneAgeImageProcessor(source_size=299, source_jpeg_quality=quality)  # type: ignore[arg-type]


def test_a_jpeg_quality_needs_a_source_size() -> None:
    with pytest.raises(InputError, match="set that too"):
        BoneAgeImageProcessor(source_jpeg_quality=92)
