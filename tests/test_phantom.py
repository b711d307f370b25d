"""Drawn hands: ossification follows the table, the mark stays with the file, a model can learn from the pictures."""

from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from boneage_hf import phantom
from boneage_hf.errors import InputError
from boneage_hf.phantom import CARPAL_BONES, PHANTOM_MARK, TIMETABLE, draw, is_phantom, ossified_centres
from boneage_hf.sex import SEXES, Sex


def _pixels(image: Image.Image) -> npt.NDArray[np.float64]:
    return np.asarray(image, np.float64)


def _brightness_at(name: str, age: float, sex: Sex, *, seed: int = 5, size: int = 384) -> float:
    """Mean grey level of 5 x 5 pixels where the middle of a carpal bone lies."""
    pose = phantom._draw_pose(np.random.default_rng(seed))
    frame = phantom._frame(age, sex, pose, size=size)
    column, row = np.round(frame.pixels(phantom._adult_outline(name)[0][None])[0]).astype(int)
    return float(_pixels(draw(age, sex, seed=seed, size=size))[row - 2 : row + 3, column - 2 : column + 3].mean())


def test_the_same_arguments_give_the_same_pixels() -> None:
    assert np.array_equal(_pixels(draw(100, "male", seed=3, size=128)), _pixels(draw(100, "male", seed=3, size=128)))


@pytest.mark.parametrize(
    ("age", "sex", "seed"),
    [(130.0, "female", 1), (100.0, "male", 1), (100.0, "female", 2)],
    ids=["age", "sex", "seed"],
)
def test_age_sex_and_seed_each_change_the_picture(age: float, sex: Sex, seed: int) -> None:
    reference = _pixels(draw(100.0, "female", seed=1, size=128))
    assert np.abs(_pixels(draw(age, sex, seed=seed, size=128)) - reference).max() > 40


@pytest.mark.parametrize("size", [64, 129, 512])
def test_the_picture_is_a_grey_square_of_the_size_asked_for(size: int) -> None:
    image = draw(120, "female", seed=0, size=size)
    assert (image.mode, image.size) == ("L", (size, size))


@pytest.mark.parametrize("age", [0, 0.5, 240, np.float32(77.5)])
@pytest.mark.parametrize("sex", SEXES)
def test_the_ends_of_the_range_and_numpy_numbers_can_be_drawn(age: float, sex: Sex) -> None:
    assert _pixels(draw(age, sex, seed=0, size=96)).std() > 10


@pytest.mark.parametrize("age", [-0.1, 240.5, float("nan"), float("inf"), True, None, "120"])
def test_an_age_outside_the_range_is_refused(age: object) -> None:
    with pytest.raises(InputError, match="0 to 240 months"):
        draw(age, "male", seed=0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="0 to 240 months"):
        ossified_centres(age, "male")  # type: ignore[arg-type]


@pytest.mark.parametrize("sex", ["F", "Male", None, 1])
def test_a_sex_that_is_not_exactly_female_or_male_is_refused(sex: object) -> None:
    with pytest.raises(InputError, match="female"):
        draw(100, sex, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("seed", "size"), [(-1, 512), (0.5, 512), (True, 512), (0, 63), (0, 2049), (0, 100.0)])
def test_a_seed_or_size_outside_the_range_is_refused(seed: int, size: int) -> None:
    with pytest.raises(InputError, match="must be a whole number from"):
        draw(100, "male", seed=seed, size=size)


@pytest.mark.parametrize(
    ("age", "girls", "boys"),
    [(0, 0, 0), (12, 2, 2), (24, 3, 2), (36, 4, 3), (60, 7, 4), (72, 7, 7), (110, 8, 7), (130, 8, 8), (240, 8, 8)],
)
def test_carpal_bones_are_counted_as_in_an_atlas(age: float, girls: int, boys: int) -> None:
    for sex, expected in zip(SEXES, (girls, boys), strict=True):
        seen = [name for name in ossified_centres(age, sex) if name in CARPAL_BONES]
        assert tuple(seen) == CARPAL_BONES[:expected]


@pytest.mark.parametrize("sex", SEXES)
def test_wrist_centres_appear_in_their_order(sex: Sex) -> None:
    order = [
        "capitate",
        "hamate",
        "distal_radius",
        "triquetrum",
        "lunate",
        "trapezium",
        "trapezoid",
        "scaphoid",
        "distal_ulna",
        "pisiform",
    ]
    order.append("adductor_sesamoid")
    onsets = [TIMETABLE[name][sex].onset_months for name in order]
    assert onsets == sorted(set(onsets))


@pytest.mark.parametrize("sex", SEXES)
def test_growth_plates_close_from_the_finger_tips_to_the_radius(sex: Sex) -> None:
    order = (
        "distal_phalanx_3",
        "proximal_phalanx_3",
        "middle_phalanx_3",
        "metacarpal_3",
        "distal_ulna",
        "distal_radius",
    )
    fusions = [TIMETABLE[name][sex].fusion_months or 0.0 for name in order]
    assert fusions == sorted(set(fusions))
    assert fusions[0] > 0


def test_every_centre_appears_grows_and_fuses_and_girls_are_earlier() -> None:
    assert len(TIMETABLE) == 7 + 1 + 2 + 1 + 19  # carpals, pisiform, forearm, sesamoid, short tubular bones
    for by_sex in TIMETABLE.values():
        girls, boys = by_sex["female"], by_sex["male"]
        assert girls.onset_months < boys.onset_months
        assert 12 <= boys.full_width_months - girls.full_width_months <= 30
        for when in (girls, boys):
            assert 0 < when.onset_months < when.full_width_months < (when.fusion_months or 240)
        assert (girls.fusion_months is None) == (boys.fusion_months is None)
        if girls.fusion_months is not None and boys.fusion_months is not None:
            assert 12 <= boys.fusion_months - girls.fusion_months <= 30


def test_growth_and_fusion_run_from_zero_to_one() -> None:
    when = TIMETABLE["distal_radius"]["male"]
    assert "distal_radius" not in ossified_centres(when.onset_months - 0.01, "male")
    assert ossified_centres(when.onset_months, "male")["distal_radius"] == phantom.Ossification(0.0, 0.0)
    assert ossified_centres(when.full_width_months, "male")["distal_radius"] == phantom.Ossification(1.0, 0.0)
    assert when.fusion_months is not None
    assert 0 < ossified_centres(when.fusion_months - 1, "male")["distal_radius"].fusion < 1
    assert ossified_centres(when.fusion_months, "male")["distal_radius"] == phantom.Ossification(1.0, 1.0)


def test_carpal_bones_fuse_with_nothing() -> None:
    seen = ossified_centres(240, "female")
    assert {seen[name].fusion for name in CARPAL_BONES} == {0.0}


def test_the_timetable_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        TIMETABLE["capitate"] = {}  # type: ignore[index]


@pytest.mark.parametrize("sex", SEXES)
@pytest.mark.parametrize("name", [name for name in CARPAL_BONES if name != "pisiform"])
def test_a_carpal_bone_is_drawn_once_it_is_ossified_and_not_before(name: str, sex: Sex) -> None:
    onset = TIMETABLE[name][sex].onset_months
    long_before = _brightness_at(name, max(0.0, onset - 8), sex)
    before = _brightness_at(name, onset - 0.5, sex)
    after = _brightness_at(name, onset + 12, sex)
    assert abs(before - long_before) < 6
    assert after - before > 12


@pytest.mark.parametrize("sex", SEXES)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_bright_bone_in_the_wrist_grows_with_age(sex: Sex, seed: int) -> None:
    pose = phantom._draw_pose(np.random.default_rng(seed))

    def wrist(age: float) -> npt.NDArray[np.float64]:
        frame = phantom._frame(age, sex, pose, size=256)
        corners = frame.pixels(np.array([[-14.0, 6.0], [18.0, 6.0], [18.0, 27.0], [-14.0, 27.0]]))
        left, top = np.min(corners, 0).astype(int)
        right, bottom = np.max(corners, 0).astype(int)
        return _pixels(draw(age, sex, seed=seed, size=256))[top:bottom, left:right]

    # At birth the wrist is soft tissue only: what is clearly brighter later is bone.
    threshold = np.percentile(wrist(0), 99) + 6
    shares = [float((wrist(age) > threshold).mean()) for age in (12, 48, 84, 120, 168)]
    assert shares == sorted(set(shares))
    assert shares[-1] > 0.6


def test_age_can_be_learned_from_the_pixels() -> None:
    rng = np.random.default_rng(0)
    ages = rng.uniform(0, 228, 180)
    rows = [
        _pixels(draw(age, "female", seed=seed, size=96).resize((24, 24), Image.Resampling.BOX)).ravel() / 255
        for seed, age in enumerate(ages)
    ]
    features = np.stack([(row - row.mean()) / row.std() for row in rows])
    train, test = slice(0, 140), slice(140, None)
    middle, mean = features[train].mean(0), ages[train].mean()
    # Ridge regression in its dual form: 140 pictures, 576 pixels.
    known, new = features[train] - middle, features[test] - middle
    weights = np.linalg.solve(known @ known.T + 30.0 * np.eye(140), ages[train] - mean)
    predicted = new @ known.T @ weights + mean
    mae = np.abs(predicted - ages[test]).mean()
    assert mae < 0.6 * np.abs(ages[test] - mean).mean()


@pytest.mark.parametrize("sex", SEXES)
def test_finger_tips_stay_inside_the_picture(sex: Sex) -> None:
    for seed in range(60):
        pose = phantom._draw_pose(np.random.default_rng(seed))
        for age in (0, 120, 240):
            hand = phantom._lay_out(age, sex, pose)
            frame = phantom._frame(age, sex, pose, size=512)
            tips = np.array(frame.pixels(np.stack([bone.tip for bone in hand])))
            assert tips.min() > 8
            assert tips.max() < 504


def test_the_thumb_points_to_the_right() -> None:
    pose = phantom._draw_pose(np.random.default_rng(0))
    frame = phantom._frame(120, "male", pose, size=512)
    tips = {bone.name: frame.pixels(bone.tip[None])[0][0] for bone in phantom._lay_out(120, "male", pose)}
    assert tips["distal_phalanx_1"] > tips["distal_phalanx_2"] > tips["distal_phalanx_5"]


def test_a_drawn_image_says_so_in_memory() -> None:
    assert draw(100, "male", seed=0, size=64).info["Description"] == PHANTOM_MARK


def test_the_mark_survives_saving_and_every_way_to_read_it(tmp_path: Path) -> None:
    image = draw(100, "male", seed=0, size=64)
    target = tmp_path / "hand.png"
    phantom.save_png(image, target)
    stream = BytesIO()
    phantom.save_png(image, stream)
    assert target.read_bytes() == stream.getvalue() == phantom.png_bytes(image)
    assert is_phantom(target)
    assert is_phantom(str(target))
    assert is_phantom(target.read_bytes())
    assert b"tEXtDescription\x00" + PHANTOM_MARK.encode() in target.read_bytes()
    with Image.open(target) as saved:
        assert np.array_equal(_pixels(saved), _pixels(image))
    assert [path.name for path in tmp_path.iterdir()] == ["hand.png"]


def test_a_png_without_the_mark_is_no_phantom() -> None:
    buffer = BytesIO()
    Image.new("L", (8, 8)).save(buffer, format="PNG")
    assert not is_phantom(buffer.getvalue())


def test_an_image_that_was_not_drawn_is_not_marked_as_drawn(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="phantom mark"):
        phantom.save_png(Image.new("L", (8, 8)), tmp_path / "hand.png")
    assert not list(tmp_path.iterdir())


def test_saving_into_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="folder"):
        phantom.save_png(draw(100, "male", seed=0, size=64), tmp_path / "missing" / "hand.png")


def test_a_file_that_is_no_image_is_refused_without_its_name(tmp_path: Path) -> None:
    path = tmp_path / "doe_jane.png"
    path.write_text("no image")
    with pytest.raises(InputError, match="cannot be opened as an image") as caught:
        is_phantom(path)
    assert "doe" not in str(caught.value)
