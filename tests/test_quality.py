"""The quality gate: what is refused, warned of and put right, before and after the network has seen the image."""

import io
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from drawn import png
from make_tiny_checkpoint import CHECKPOINT
from PIL import Image

from boneage_hf import BoneAgeConfig, BoneAgeModel, BoneAgePipeline, InputError, load_pipeline, load_split, radiograph
from boneage_hf.batch import collect, predict_batch, rows_to_csv
from boneage_hf.cli import main
from boneage_hf.data import prepare_phantoms
from boneage_hf.evaluation import predict_dataset
from boneage_hf.fitted_gate import CHANGES, Pooled, changed, fit_gate, fit_gate_of_checkpoint
from boneage_hf.phantom import draw, png_bytes
from boneage_hf.quality import (
    FEW_LEVELS,
    GATE_FIELDS,
    MAX_COLOUR_SHARE,
    MIN_LEVELS,
    MIN_SIDE,
    Check,
    GateReading,
    HandGate,
    Quality,
    RefusedError,
    check_gate,
    inspect,
    judge,
    put_right,
    to_standard_pose,
)

CPU = torch.device("cpu")
GATE = {
    "components": 2,
    "cells": 2,
    "residual_variance": 0.5,
    "refuse_above": 3.0,
    "warn_above": 2.0,
    "turn_above": 4.0,
    "mirror_above": 1.0,
    "cut_off_above": 0.5,
}


def verdicts(quality: Quality) -> dict[str, str]:
    return {check.name: check.verdict for check in quality.checks}


def seen(image: Image.Image, **facts: Any) -> dict[str, str]:
    return verdicts(inspect(image, image_size=64, **facts))


def levels_picture(levels: int, side: int = 100) -> Image.Image:
    """A picture in which `levels` grey levels are equally frequent, and one speck of another."""
    pixels = np.resize(np.arange(levels, dtype=np.uint8) * 2, (side, side))
    pixels[0, 0] = 255
    return Image.fromarray(pixels)


# --- one image's quality --------------------------------------------------------------------------------------------


def test_the_gravest_check_is_the_verdict_and_refusals_are_told_first() -> None:
    checks = (Check("a", "warn", "A."), Check("b", "pass", "B."), Check("c", "refuse", "C."), Check("d", "warn", "D."))
    assert Quality(checks).verdict == "refuse"
    assert Quality(checks).reasons == ("C.", "A.", "D.")
    assert Quality(checks[:2]).verdict == "warn"
    assert Quality(checks[1:2]).verdict == "pass"
    assert Quality(checks[1:2]).reasons == ()


def test_corrections_are_told_in_words_and_only_where_they_were_made() -> None:
    assert Quality(()).corrections == ()
    told = Quality((), rotation_degrees=270, mirrored=True, inverted=True).corrections
    assert [word in sentence for word, sentence in zip(("inverted", "270", "mirrored"), told, strict=True)] == [
        True
    ] * 3
    assert Quality((), mirrored=True).corrections == told[2:]


def test_a_quality_can_be_written_as_json() -> None:
    quality = Quality((Check("size", "warn", "Small."),), rotation_degrees=90)
    told = json.loads(json.dumps(quality.as_dict()))
    assert told["checks"] == [{"name": "size", "verdict": "warn", "sentence": "Small."}]
    assert (told["verdict"], told["reasons"], told["rotation_degrees"]) == ("warn", ["Small."], 90)
    assert told["corrections"] == list(quality.corrections)


def test_a_refusal_survives_pickling_as_worker_processes_need() -> None:
    refusal = RefusedError("No.", Quality((Check("size", "refuse", "No."),)))
    again = pickle.loads(pickle.dumps(refusal))
    assert (str(again), again.quality) == ("No.", refusal.quality)
    assert isinstance(again, InputError)


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_an_image_is_put_right_as_the_network_saw_it(degrees: int, mirrored: bool, inverted: bool) -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    quality = Quality((), rotation_degrees=degrees, mirrored=mirrored, inverted=inverted)
    expected = np.rot90(255 - pixels if inverted else pixels, -degrees // 90)  # numpy turns counter-clockwise
    expected = expected[:, ::-1] if mirrored else expected
    np.testing.assert_array_equal(np.asarray(put_right(Image.fromarray(pixels), quality)), expected)
    pose = degrees // 90 + 4 * mirrored
    turned = to_standard_pose(torch.from_numpy(255 - pixels if inverted else pixels), pose)
    np.testing.assert_array_equal(turned.numpy(), expected)


def test_a_colour_picture_is_put_right_too() -> None:
    pixels = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    right = put_right(Image.fromarray(pixels), Quality((), rotation_degrees=90, inverted=True))
    np.testing.assert_array_equal(np.asarray(right), np.rot90(255 - pixels, -1))


def test_a_quarter_clockwise_brings_the_left_border_to_the_top() -> None:
    pixels = np.zeros((4, 4), np.uint8)
    pixels[:, 0] = 255
    right = np.asarray(put_right(Image.fromarray(pixels), Quality((), rotation_degrees=90)))
    assert right[0].all()
    assert not right[1:].any()


@pytest.mark.parametrize("pose", range(1, 8))
def test_the_poses_of_the_fit_are_those_that_are_put_right(pose: int) -> None:
    pixels = np.arange(25, dtype=np.uint8).reshape(5, 5)
    turned = changed(pixels, pose, np.random.default_rng(0))
    assert not np.array_equal(turned, pixels)
    np.testing.assert_array_equal(to_standard_pose(torch.from_numpy(turned.copy()), pose).numpy(), pixels)


@pytest.mark.parametrize(("change", "lost"), [(8, "top"), (9, "left"), (10, "right")])
def test_a_cut_takes_away_one_side_and_keeps_the_size(change: int, lost: str) -> None:
    ramp = np.tile(np.linspace(0, 250, 100), (100, 1))
    pixels = {"top": ramp.T, "left": ramp, "right": ramp[:, ::-1]}[lost].astype(np.uint8)
    cut = changed(pixels, change, np.random.default_rng(0))
    assert cut.shape == pixels.shape
    assert 40 < cut.min() < 105  # a fifth to two fifths of the ramp are gone at its dark end
    assert cut.max() == pixels.max()


# --- checks without a network ---------------------------------------------------------------------------------------


def test_a_drawn_hand_passes_every_check_of_the_picture() -> None:
    quality = inspect(draw(120, "female", seed=1, size=128), image_size=64)
    assert set(verdicts(quality).values()) == {"pass"}
    assert quality.verdict == "pass"


@pytest.mark.parametrize("level", [0, 77, 255])
def test_a_constant_picture_is_refused(level: int) -> None:
    assert seen(Image.new("L", (100, 100), level))["pixels"] == "refuse"
    almost = Image.new("L", (100, 100), level)
    almost.putpixel((3, 3), 128)
    assert seen(almost)["pixels"] == "pass"


@pytest.mark.parametrize(
    ("size", "verdict"),
    [
        ((MIN_SIDE - 1, 500), "refuse"),
        ((500, MIN_SIDE - 1), "refuse"),
        ((MIN_SIDE, 500), "warn"),
        ((500, 99), "warn"),
        ((100, 100), "pass"),
    ],
)
def test_too_small_is_refused_and_smaller_than_the_network_reads_is_warned_of(
    size: tuple[int, int], verdict: str
) -> None:
    assert verdicts(inspect(Image.new("L", size), image_size=100))["size"] == verdict


@pytest.mark.parametrize(
    ("levels", "verdict"),
    [(2, "refuse"), (MIN_LEVELS - 1, "refuse"), (MIN_LEVELS, "warn"), (FEW_LEVELS - 1, "warn"), (FEW_LEVELS, "pass")],
)
def test_few_grey_levels_are_warned_of_and_very_few_refused(levels: int, verdict: str) -> None:
    assert seen(levels_picture(levels))["grey_levels"] == verdict


def test_a_level_of_a_few_specks_does_not_count() -> None:
    pixels = np.asarray(levels_picture(MIN_LEVELS - 1)).copy()
    pixels[0, :10] = 201  # one in a thousand of 10,000 pixels
    assert seen(Image.fromarray(pixels))["grey_levels"] == "refuse"
    pixels[0, :11] = 201
    assert seen(Image.fromarray(pixels))["grey_levels"] == "warn"


@pytest.mark.parametrize(
    ("share", "verdict"), [(0.0, "pass"), (0.001, "warn"), (MAX_COLOUR_SHARE, "warn"), (0.06, "refuse")]
)
def test_much_colour_is_refused_and_a_little_warned_of(share: float, verdict: str) -> None:
    assert seen(draw(100, "male", seed=1, size=100), colour_share=share)["colour"] == verdict


def test_inversion_is_told_and_no_fault() -> None:
    quality = inspect(draw(100, "male", seed=1, size=100), image_size=64, inverted=True)
    assert quality.inverted
    assert quality.verdict == "pass"
    assert "dark" in next(check.sentence for check in quality.checks if check.name == "polarity")


def test_a_drawn_phantom_is_warned_of() -> None:
    quality = inspect(draw(100, "male", seed=1, size=100), image_size=64, drawn_phantom=True)
    assert quality.drawn_phantom
    assert quality.reasons == ("This is a drawn phantom, not a radiograph.",)


# --- colour and the phantom's mark, as they are read ----------------------------------------------------------------


def encoded(pixels: np.ndarray, file_format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, file_format)
    return stream.getvalue()


def test_a_grey_picture_has_no_colour_share() -> None:
    grey = np.asarray(draw(100, "male", seed=1, size=100))
    assert radiograph.read(encoded(grey)).colour_share == 0
    assert radiograph.read(encoded(np.stack([grey] * 3, -1), "JPEG")).colour_share == 0


def test_a_tinted_film_is_coloured_but_its_colours_follow_from_its_grey() -> None:
    grey = np.asarray(draw(100, "male", seed=1, size=200)).astype(float)
    tinted = np.stack([grey * 0.7, grey * 0.8, grey], -1).astype(np.uint8)
    seen = radiograph.read(encoded(tinted))
    assert seen.has_colour
    assert seen.colour_share < 0.01


@pytest.mark.parametrize("bits", [8, 16])
def test_a_picture_in_many_colours_has_a_large_colour_share(bits: int) -> None:
    rng = np.random.default_rng(0)
    patches = np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((25, 25, 1))).astype(np.uint8)
    if bits == 8:
        share = radiograph.read(encoded(patches)).colour_share
    else:
        share = radiograph.read(png(patches.astype(np.uint16) * 257)).colour_share
    assert share > 0.5


def test_a_coloured_note_on_a_radiograph_is_a_small_share() -> None:
    pixels = np.stack([np.asarray(draw(100, "male", seed=1, size=200))] * 3, -1).copy()
    pixels[:20, :60] = (255, 0, 0)  # 3 %
    share = radiograph.read(encoded(pixels)).colour_share
    assert 0 < share <= MAX_COLOUR_SHARE


def test_the_mark_of_a_drawn_phantom_is_read_from_its_file_only() -> None:
    hand = draw(100, "male", seed=1, size=100)
    assert radiograph.read(png_bytes(hand)).drawn_phantom
    assert not radiograph.read(encoded(np.asarray(hand))).drawn_phantom
    assert radiograph.read(png_bytes(hand)).image.info == {}


# --- the gate's numbers ---------------------------------------------------------------------------------------------


def random_gate(channels: int = 6) -> HandGate:
    rng = np.random.default_rng(3)
    gate = HandGate(dict(GATE), channels)
    orthonormal = np.linalg.qr(rng.normal(size=(channels, channels)))[0][:2]
    gate.basis.copy_(torch.from_numpy(orthonormal))
    gate.scale.copy_(torch.tensor([3.0, 1.5]))
    gate.center.copy_(torch.from_numpy(rng.normal(size=channels)))
    for name in ("pose_weight", "pose_bias", "cut_off_weight", "cut_off_bias"):
        buffer = getattr(gate, name)
        buffer.copy_(torch.from_numpy(rng.normal(size=tuple(buffer.shape))))
    return gate


def test_the_distance_is_that_of_a_gaussian_with_components_and_a_residual_variance() -> None:
    gate = random_gate()
    features = torch.randn(5, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    basis, scale = gate.basis.double().numpy(), gate.scale.double().numpy()
    rest = np.eye(6) - basis.T @ basis
    covariance = basis.T @ np.diag(scale**2) @ basis + GATE["residual_variance"] * rest
    expected = []
    for maps in features.double().numpy():
        offset = maps.mean((1, 2)) - gate.center.double().numpy()
        expected.append(math.sqrt(offset @ np.linalg.inv(covariance) @ offset / 6))
    np.testing.assert_allclose(gate.distance(features).numpy(), expected, rtol=1e-5)


def test_cells_are_the_scaled_components_of_the_quarters_of_the_picture() -> None:
    gate = random_gate()
    features = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    quarter = features[1, :, 2:, :2].mean((1, 2))  # lower left: the third of four cells
    expected = gate.basis @ (quarter - gate.center) / gate.scale
    torch.testing.assert_close(gate.cells(features)[1].reshape(2, 4)[:, 2], expected)


def scores(**probabilities: float) -> torch.Tensor:
    """Log probabilities of the poses, the rest shared out: p0=0.9 and the like."""
    given = {int(name[1:]): value for name, value in probabilities.items()}
    rest = (1 - sum(given.values())) / (8 - len(given))
    return torch.tensor([[given.get(pose, rest) for pose in range(8)]]).log()


@pytest.mark.parametrize(
    ("probabilities", "pose"),
    [
        ({"p0": 0.9}, 0),
        ({"p1": 0.98}, 1),
        ({"p3": 0.9}, 0),  # not sure enough: log odds below 4
        ({"p1": 0.5, "p5": 0.49}, 1),  # sure of the turn, not of the mirror
        ({"p5": 0.8, "p1": 0.19}, 5),
        ({"p2": 0.001, "p6": 0.998}, 6),
        ({"p4": 0.7, "p0": 0.29}, 0),  # log odds of the mirror below 1
        ({"p4": 0.8, "p0": 0.19}, 4),
    ],
)
def test_a_turn_and_a_mirroring_need_their_own_odds(probabilities: dict[str, float], pose: int) -> None:
    near, far = torch.tensor([1.9]), torch.tensor([2.1])
    assert random_gate().poses_of(scores(**probabilities), near).tolist() == [pose]
    assert random_gate().poses_of(scores(p3=0.9), far).tolist() == [3]  # nothing is lost by trying the likeliest
    assert random_gate().poses_of(scores(p0=0.5), far).tolist() == [0]


@pytest.mark.parametrize(
    ("reading", "phantom", "expected"),
    [
        (GateReading(1.0, 0, 0.0), False, {"rotation": "pass", "mirror": "pass", "cut_off": "pass", "hand": "pass"}),
        (GateReading(2.5, 0, 0.0), False, {"rotation": "pass", "mirror": "pass", "cut_off": "pass", "hand": "warn"}),
        (GateReading(3.5, 3, 0.0), False, {"rotation": "warn", "mirror": "pass", "cut_off": "pass", "hand": "refuse"}),
        (GateReading(9.9, 4, 0.6), True, {"rotation": "pass", "mirror": "warn", "cut_off": "warn", "hand": "pass"}),
    ],
)
def test_a_reading_is_judged_by_the_limits(reading: GateReading, phantom: bool, expected: dict[str, str]) -> None:
    quality = judge(Quality((), drawn_phantom=phantom), GATE, reading)
    assert verdicts(quality) == expected
    assert (quality.rotation_degrees, quality.mirrored) == (90 * (reading.pose % 4), reading.pose >= 4)


def test_without_a_gate_the_missing_check_is_named() -> None:
    quality = judge(Quality(()), None, None)
    assert verdicts(quality) == {"hand": "warn"}
    assert "was not checked" in quality.reasons[0]
    assert "fit-gate" in quality.reasons[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"components": 0},
        {"cells": 1.5},
        {"cells": True},
        {"residual_variance": 0.0},
        {"refuse_above": math.inf},
        {"warn_above": 3.5},
        {"warn_above": 0.0},
        {"turn_above": "4"},
        {"more": 1},
    ],
)
def test_a_gate_that_makes_no_sense_is_refused_by_the_config(wrong: dict[str, Any]) -> None:
    BoneAgeConfig(gate=dict(GATE))
    with pytest.raises(InputError, match="gate"):
        BoneAgeConfig(gate=GATE | wrong)
    for field in GATE_FIELDS:
        with pytest.raises(InputError, match="fields"):
            check_gate({name: value for name, value in GATE.items() if name != field})


# --- the fit --------------------------------------------------------------------------------------------------------


def gaussian(n: int, seed: int, *, corner: int | None = 0) -> Pooled:
    """Features of made-up hands: 12 channels of unlike spread, and in one corner cell a bright spot in channel 0."""
    rng = np.random.default_rng(seed)
    spread = np.r_[4.0, 2.0, np.full(10, 0.5)]
    mean = rng.normal(size=(n, 12)) * spread + 1
    cells = mean[:, :, None, None] + 0.1 * rng.normal(size=(n, 12, 2, 2))
    if corner is not None:
        cells[:, 1, corner // 2, corner % 2] += 12
    return Pooled(torch.from_numpy(mean).float(), torch.from_numpy(cells).float())


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> HandGate:
    monkeypatch.setattr("boneage_hf.fitted_gate.COMPONENTS", 2)
    # A quarter turn counter-clockwise brings the upper left corner to the lower left, and so on.
    corners = {1: 2, 2: 3, 3: 1}
    changes = np.resize((1, 2, 3, 8), 400)
    parts = [gaussian(1, 100 + i, corner=corners.get(int(change))) for i, change in enumerate(changes)]
    others = Pooled(torch.cat([p.mean for p in parts]), torch.cat([p.cells for p in parts]))
    return fit_gate(gaussian(600, 1), others, changes, gaussian(1000, 2))


def test_the_fit_finds_the_components_and_what_they_leave_over(fitted: HandGate) -> None:
    assert fitted.settings["components"] == 2
    np.testing.assert_allclose(np.abs(fitted.basis[:, :2].numpy()), np.eye(2), atol=0.05)
    np.testing.assert_allclose(fitted.scale.numpy(), [4, 2], rtol=0.1)
    assert fitted.settings["residual_variance"] == pytest.approx(0.25, rel=0.1)
    check_gate(fitted.settings)


def test_the_limits_leave_the_stated_shares_of_new_hands_outside(fitted: HandGate) -> None:
    calibration, new = (gaussian(n, seed).mean[:, :, None, None] for n, seed in ((1000, 2), (20_000, 3)))
    refuse, warn = fitted.settings["refuse_above"], fitted.settings["warn_above"]
    distance = fitted.distance(calibration)
    assert int((distance > refuse).sum()) == 2  # the 998th of 1000 is the limit: ceil(1001 * 0.997)
    assert int((distance > warn).sum()) == 19
    assert float((fitted.distance(new) > refuse).float().mean()) == pytest.approx(0.003, abs=0.0025)
    assert float(fitted.distance(new).mean()) == pytest.approx(1, abs=0.1)


def test_the_fit_recognises_turns_and_what_is_cut_off(fitted: HandGate) -> None:
    for change, corner in ((0, 0), (1, 2), (2, 3), (3, 1)):
        cells = fitted.cells(gaussian(200, 9, corner=corner).cells)
        assert (fitted.poses_of(fitted.pose_scores(cells), torch.zeros(200)) == change).float().mean() > 0.97
    whole, cut = (fitted.cells(gaussian(200, 9, corner=corner).cells) for corner in (0, None))
    limit = fitted.settings["cut_off_above"]
    assert (fitted.cut_off_score(cut) > limit).float().mean() > 0.97
    assert (fitted.cut_off_score(whole) > limit).float().mean() < 0.05


def test_what_is_fitted_can_be_stored_as_float16_without_a_change(fitted: HandGate) -> None:
    for buffer in fitted.buffers():
        torch.testing.assert_close(buffer.half().float(), buffer, rtol=0, atol=0)


def test_every_change_has_its_turn_in_the_fit() -> None:
    assert set(CHANGES) == set(range(1, 11))


def test_too_few_images_for_a_gate_are_refused() -> None:
    hands, others = gaussian(10, 1), gaussian(10, 2)
    with pytest.raises(InputError, match="at least 12 training and 20 calibration images, not 10 and 30"):
        fit_gate(hands, others, [1] * 10, gaussian(30, 3))
    with pytest.raises(InputError, match="not 40 and 19"):
        fit_gate(gaussian(40, 1), gaussian(40, 2), [1] * 40, gaussian(19, 3))


# --- a checkpoint with a gate ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms-for-a-gate") / "prepared"
    prepare_phantoms(300, folder, size=64, progress=False)
    return folder


@pytest.fixture(scope="module")
def gated(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gate") / "gated"
    fitted = fit_gate_of_checkpoint(str(CHECKPOINT), phantoms, folder, progress=False)
    assert fitted.revision in str(fitted)
    return folder


@pytest.fixture(scope="module")
def plain() -> BoneAgePipeline:
    return load_pipeline(CHECKPOINT, device=CPU)


@pytest.fixture(scope="module")
def pipe(gated: Path) -> BoneAgePipeline:
    return load_pipeline(gated, device=CPU)


#: Without the mark of a phantom, so that the gate looks at them as at radiographs.
HANDS = [np.asarray(draw(age, "female", seed=age, size=128)) for age in (60, 120, 180)]
NOISE = np.random.default_rng(0).integers(0, 256, (128, 128), dtype=np.uint8)


def test_a_hand_passes_and_its_answer_is_that_of_the_checkpoint_without_a_gate(
    pipe: BoneAgePipeline, plain: BoneAgePipeline
) -> None:
    for hand in HANDS:
        answer, expected = pipe(hand, sex="female"), plain(hand, sex="female")
        assert verdicts(answer["quality"])["hand"] in ("pass", "warn")
        if answer["quality"].rotation_degrees == 0 and not answer["quality"].mirrored:
            assert answer["bone_age_months"] == expected["bone_age_months"]
            np.testing.assert_array_equal(answer["attention"], expected["attention"])


def test_noise_is_refused_with_its_reason_and_cure(pipe: BoneAgePipeline) -> None:
    with pytest.raises(
        RefusedError, match=r"not look like a radiograph of one hand: give .* turn the quality check off\.$"
    ) as refused:
        pipe(NOISE, sex="female")
    assert refused.value.quality.verdict == "refuse"
    assert str(refused.value) == refused.value.quality.reasons[0]


def test_with_the_check_turned_off_everything_is_answered(pipe: BoneAgePipeline, plain: BoneAgePipeline) -> None:
    answer = pipe(NOISE, sex="female", check_quality=False)
    assert answer["quality"] is None
    assert answer["bone_age_months"] == plain(NOISE, sex="female")["bone_age_months"]
    assert plain(np.zeros((90, 90), np.uint8), sex="male", check_quality=False)["quality"] is None


def test_a_phantom_is_never_refused_for_not_being_a_radiograph(pipe: BoneAgePipeline) -> None:
    gate: Any = pipe.model.gate
    pipe.model.gate = HandGate(gate.settings, 32)
    try:
        pipe.model.gate.load_state_dict(gate.state_dict())
        pipe.model.gate.center += 100  # now every picture is far away
        with pytest.raises(RefusedError):
            pipe(HANDS[0], sex="female")
        for drawn in (draw(60, "male", seed=1, size=128), png_bytes(draw(60, "male", seed=1, size=128))):
            quality = pipe(drawn, sex="male")["quality"]
            assert quality.drawn_phantom
            assert quality.verdict == "warn"
            assert verdicts(quality)["drawn_phantom"] == "warn"
    finally:
        pipe.model.gate = gate


def forced(gate: Any, monkeypatch: pytest.MonkeyPatch, *, poses: list[int], distances: list[list[float]]) -> None:
    """Let the gate see these poses, and these distances call by call."""
    answers = iter(distances)
    monkeypatch.setattr(gate, "poses_of", lambda scores, distance: torch.tensor(poses))
    monkeypatch.setattr(gate, "distance", lambda features: torch.tensor(next(answers)))


@pytest.mark.parametrize("flip_average", [False, True])
@pytest.mark.parametrize("pose", [1, 2, 3, 5, 6, 7])
def test_a_turned_hand_gets_the_answer_of_the_upright_one(
    pipe: BoneAgePipeline, monkeypatch: pytest.MonkeyPatch, pose: int, flip_average: bool
) -> None:
    turned = changed(HANDS[1], pose, np.random.default_rng(0))
    forced(pipe.model.gate, monkeypatch, poses=[pose], distances=[[0.9], [0.5], [0.5]])
    upright = pipe(HANDS[1], sex="male", flip_average=flip_average, check_quality=False)
    answer = pipe(turned, sex="male", flip_average=flip_average)
    quality = answer["quality"]
    assert quality.rotation_degrees + 360 * quality.mirrored == 90 * (pose % 4) + 360 * (pose >= 4)
    assert answer["bone_age_months"] == pytest.approx(upright["bone_age_months"], abs=0.5)
    np.testing.assert_allclose(answer["attention"], upright["attention"], atol=0.02)
    np.testing.assert_array_equal(np.asarray(put_right(Image.fromarray(turned), quality)), HANDS[1])


def test_a_turn_that_brings_it_no_nearer_is_not_made(pipe: BoneAgePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    as_it_is = pipe(HANDS[1], sex="male", check_quality=False)["bone_age_months"]
    forced(pipe.model.gate, monkeypatch, poses=[2], distances=[[0.5], [0.9], [0.5]])
    answer = pipe(HANDS[1], sex="male")
    assert (answer["quality"].rotation_degrees, answer["bone_age_months"]) == (0, as_it_is)


def test_a_mirrored_hand_is_put_right_whatever_its_distance(
    pipe: BoneAgePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced(pipe.model.gate, monkeypatch, poses=[4], distances=[[0.5], [0.9], [0.5]])
    answer = pipe(HANDS[1][:, ::-1].copy(), sex="male")
    assert answer["quality"].mirrored
    assert answer["quality"].verdict == "warn"


def test_of_a_batch_each_image_has_its_own_pose_and_answer(
    pipe: BoneAgePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [pipe(hand, sex="male", check_quality=False)["bone_age_months"] for hand in HANDS]
    images = [HANDS[0], changed(HANDS[1], 1, np.random.default_rng(0)), HANDS[2]]
    forced(pipe.model.gate, monkeypatch, poses=[0, 1, 0], distances=[[0.9, 0.9, 0.9], [0.5], [0.5, 0.5, 0.5]])
    answers = pipe(images, sex="male", batch_size=3)
    assert [answer["quality"].rotation_degrees for answer in answers] == [0, 90, 0]
    np.testing.assert_allclose([answer["bone_age_months"] for answer in answers], expected, atol=0.5)


def test_an_upright_hand_goes_through_the_network_once(pipe: BoneAgePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    forced(pipe.model.gate, monkeypatch, poses=[0], distances=[[0.5], [0.5]])
    calls = []
    handle = pipe.model.backbone.register_forward_hook(lambda *_: calls.append(1))
    try:
        pipe(HANDS[0], sex="female")
    finally:
        handle.remove()
    assert len(calls) == 1


def test_a_checkpoint_without_a_gate_says_that_the_check_is_missing(plain: BoneAgePipeline) -> None:
    assert plain.model.gate is None
    quality = plain(HANDS[0], sex="female")["quality"]
    assert quality.verdict == "warn"
    assert "was not checked" in quality.reasons[-1]


def test_the_gate_is_saved_with_the_checkpoint_and_its_provenance(gated: Path, phantoms: Path) -> None:
    config = json.loads((gated / "config.json").read_text())
    provenance = config["provenance"]["gate"]
    assert provenance["n"] == provenance["n_changed"] == len(load_split(phantoms, "train")) // 2
    assert provenance["calibration_n"] == len(load_split(phantoms, "calibration"))
    assert len({provenance[name] for name in ("fingerprint", "changed_fingerprint", "calibration_fingerprint")}) == 3
    assert {"commit", "package_version", "base_revision", "seed"} <= set(provenance)
    model = BoneAgeModel.from_pretrained(gated)
    names = {name for name in model.state_dict() if name.startswith("gate.")}
    assert len(names) == 7
    plain = BoneAgeModel.from_pretrained(CHECKPOINT).state_dict()
    assert set(model.state_dict()) == set(plain) | names
    for name, value in plain.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_gate_can_be_fitted_anew_and_comes_out_the_same(gated: Path, phantoms: Path, tmp_path: Path) -> None:
    again = fit_gate_of_checkpoint(str(gated), phantoms, tmp_path / "again", progress=False)
    for name, value in again.gate.items():
        assert value == pytest.approx(json.loads((gated / "config.json").read_text())["gate"][name], rel=1e-3), name


def test_a_gate_is_fitted_to_one_backbone_and_size_and_dropped_with_them(gated: Path) -> None:
    model = BoneAgeModel.from_pretrained(gated)
    model.resize_attention(96)
    assert model.gate is None
    assert model.config.gate is None
    assert not [name for name in model.state_dict() if name.startswith("gate.")]


def test_evaluation_predicts_every_image_and_its_numbers_do_not_change(
    pipe: BoneAgePipeline, plain: BoneAgePipeline, phantoms: Path
) -> None:
    rows = load_split(phantoms, "test")

    def blacken(image: Image.Image) -> Image.Image:
        return Image.new("L", image.size)

    for alter in (None, blacken):
        tables = [predict_dataset(each, rows, progress=False, alter=alter) for each in (pipe, plain)]
        assert len(tables[0]) == len(rows)
        pd.testing.assert_frame_equal(tables[0], tables[1])


# --- where people meet it -------------------------------------------------------------------------------------------


def test_a_refused_row_of_a_table_is_named(pipe: BoneAgePipeline) -> None:
    table: Any = pd.DataFrame({"image": pd.Series([HANDS[0], NOISE], dtype=object), "sex": ["female", "male"]})
    with pytest.raises(RefusedError, match="Row 2 of the table: This does not look"):
        pipe.predict_table(table)
    with pytest.raises(RefusedError, match="Row 1 of the table: All pixels"):
        pipe.predict_table(table.assign(image=[np.zeros((90, 90), np.uint8), NOISE]))
    assert pipe.predict_table(table, check_quality=False)["predicted_months"].notna().all()


def test_a_refused_file_of_a_batch_is_a_row_with_its_reasons(pipe: BoneAgePipeline) -> None:
    files = [
        ("hand.png", encoded(HANDS[0])),
        ("noise.png", encoded(NOISE)),
        ("drawn.png", png_bytes(draw(60, "male", seed=1, size=128))),
    ]
    hand, noise, drawn = predict_batch(pipe, collect(files), sex="female")
    assert hand.bone_age_months is not None
    assert hand.quality in ("pass", "warn")
    assert noise.bone_age_months is None
    assert noise.quality == "refuse"
    assert noise.problem is not None
    assert noise.problem in str(noise.quality_reasons)
    assert (drawn.quality, drawn.problem) == ("warn", None)
    assert "drawn phantom" in str(drawn.quality_reasons)
    assert "does not look like" in rows_to_csv([noise], source={})
    unchecked = list(predict_batch(pipe, collect(files[1:2]), sex="female", check_quality=False))
    assert unchecked[0].bone_age_months is not None
    assert unchecked[0].quality is None


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., list[str]]:
    def write(**pictures: np.ndarray) -> list[str]:
        paths = []
        for name, pixels in pictures.items():
            (tmp_path / f"{name}.png").write_bytes(encoded(pixels))
            paths.append(str(tmp_path / f"{name}.png"))
        return paths

    return write


def test_the_command_line_refuses_warns_and_can_be_told_not_to(
    gated: Path, files: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    paths = files(noise=NOISE, hand=np.asarray(Image.fromarray(HANDS[0]).convert("L")))
    assert main(["predict", str(gated), *paths, "--sex", "female"]) == 2
    told = capsys.readouterr()
    assert "error: file 1: This does not look like" in told.err
    assert "file 2: bone age" in told.out
    assert main(["predict", str(gated), paths[0], "--sex", "female", "--no-quality-check"]) == 0
    assert capsys.readouterr().out.startswith("file 1: bone age")


def test_the_command_line_gives_the_quality_as_json_and_as_lines(
    files: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = files(hand=255 - HANDS[0])
    assert main(["predict", str(CHECKPOINT), path, "--sex", "female", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["quality"]["inverted"] is True
    assert main(["predict", str(CHECKPOINT), path, "--sex", "female"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [f"  {line}" for line in (*told["quality"]["corrections"], *told["quality"]["reasons"])]
    assert "inverted" in lines[1]


def test_the_command_fits_a_gate(phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gated"
    assert main(["fit-gate", str(CHECKPOINT), str(phantoms), str(out), "--images", "70"]) == 0
    told = capsys.readouterr().out
    assert "gate from 70 training images" in told
    assert (out / "model.safetensors").is_file()
    assert main(["fit-gate", str(CHECKPOINT), str(phantoms), str(CHECKPOINT)]) == 2
