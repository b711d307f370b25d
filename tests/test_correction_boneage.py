"""What is laid on the network's answer: by its formula, monotone, in every answer and in no loss."""

from typing import Any

import numpy as np
import pytest
import torch
from make_tiny_checkpoint import CHECKPOINT, GOLDEN

from boneage_hf import BoneAgeModel, load_pipeline
from boneage_hf.calibration import apply_age_correction
from boneage_hf.correction_boneage import check_age_correction, check_local_calibration, correct_months
from boneage_hf.errors import InputError

CORRECTION: dict[str, Any] = {"knots_months": [20.0, 120.0, 210.0], "offsets_months": [-5.0, 1.0, 4.0]}
LOCAL: dict[str, Any] = {"offsets_months": [3.0, -2.0], "slope": 1.1, "centre_months": 100.0}
INTERVAL: dict[str, Any] = {
    "alpha": 0.1,
    "edges_months": [],
    "quantiles": [2.0],
    "knots_months": [100.0],
    "spread_months": [7.0],
}
AGES = torch.linspace(-20, 260, 281)
SEX = torch.arange(281) % 2


def corrected(ages: torch.Tensor, sex: torch.Tensor | None = None, **given: Any) -> torch.Tensor:
    return correct_months(ages, sex, **{"age_correction": None, "local_calibration": None, **given})


def test_nothing_laid_on_changes_nothing() -> None:
    assert torch.equal(corrected(AGES), AGES)


def test_the_correction_over_age_equals_a_plain_one() -> None:
    wanted = []
    for age in AGES.tolist():
        if age <= 20:
            wanted.append(age - 5)
        elif age >= 210:
            wanted.append(age + 4)
        elif age < 120:
            wanted.append(age - 5 + 6 * (age - 20) / 100)
        else:
            wanted.append(age + 1 + 3 * (age - 120) / 90)
    np.testing.assert_allclose(corrected(AGES, age_correction=CORRECTION), wanted, rtol=0, atol=1e-4)


def test_the_fit_applies_a_correction_as_the_model_does() -> None:
    wanted = apply_age_correction(AGES.numpy(), CORRECTION)
    np.testing.assert_allclose(corrected(AGES, age_correction=CORRECTION), wanted, rtol=0, atol=1e-4)


def test_corrected_ages_rise_with_the_uncorrected_ones() -> None:
    assert bool((corrected(AGES, age_correction=CORRECTION).diff() > 0).all())
    with pytest.raises(InputError, match="must rise with the uncorrected"):
        check_age_correction({"knots_months": [20.0, 30.0], "offsets_months": [5.0, -5.0]})


def test_a_local_calibration_turns_about_its_centre_and_adds_the_offset_of_the_sex() -> None:
    wanted = 100 + 1.1 * (AGES - 100) + torch.tensor([3.0, -2.0])[SEX]
    torch.testing.assert_close(corrected(AGES, SEX, local_calibration=LOCAL), wanted)


def test_one_offset_serves_a_model_without_sex() -> None:
    one = LOCAL | {"offsets_months": [3.0], "slope": 1.0}
    check_local_calibration(one, uses_sex=False)
    torch.testing.assert_close(corrected(AGES, local_calibration=one), AGES + 3)


def test_offsets_by_sex_without_a_sex_are_refused() -> None:
    with pytest.raises(InputError, match="each child's sex"):
        corrected(AGES, local_calibration=LOCAL)


def test_the_correction_over_age_comes_before_the_local_calibration() -> None:
    both = corrected(AGES, SEX, age_correction=CORRECTION, local_calibration=LOCAL)
    torch.testing.assert_close(
        both, corrected(corrected(AGES, age_correction=CORRECTION), SEX, local_calibration=LOCAL)
    )


# --- in the model ---------------------------------------------------------------------------------------------------


@pytest.fixture
def model() -> BoneAgeModel:
    return BoneAgeModel.from_pretrained(CHECKPOINT)


PIXELS = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SIX = torch.tensor([0, 1, 1, 0, 0, 1])


def test_the_model_answers_in_corrected_months(model: BoneAgeModel) -> None:
    with torch.no_grad():
        plain = model(PIXELS, sex=SIX).bone_age_months
        model.config.age_correction, model.config.local_calibration = CORRECTION, LOCAL
        laid_on = model(PIXELS, sex=SIX).bone_age_months
    wanted = corrected(plain, SIX, age_correction=CORRECTION, local_calibration=LOCAL)
    torch.testing.assert_close(laid_on, wanted)
    assert float((laid_on - plain).abs().min()) > 0.01


def test_the_loss_is_that_of_the_networks_own_answer(model: BoneAgeModel) -> None:
    labels = torch.linspace(30, 180, 6)
    with torch.no_grad():
        plain = model(PIXELS, sex=SIX, labels=labels).loss
        model.config.age_correction, model.config.local_calibration = CORRECTION, LOCAL
        assert torch.equal(model(PIXELS, sex=SIX, labels=labels).loss, plain)


def test_a_model_with_corrections_comes_back_from_its_folder(model: BoneAgeModel, tmp_path: Any) -> None:
    model.config.age_correction, model.config.local_calibration = CORRECTION, LOCAL
    model.config.interval = INTERVAL
    model.save_pretrained(tmp_path)
    loaded = BoneAgeModel.from_pretrained(tmp_path)
    assert (loaded.config.age_correction, loaded.config.local_calibration) == (CORRECTION, LOCAL)
    assert loaded.config.interval == INTERVAL
    with torch.no_grad():
        assert torch.equal(loaded(PIXELS, sex=SIX).bone_age_months, model.eval()(PIXELS, sex=SIX).bone_age_months)


def test_a_model_for_another_size_has_lost_what_was_fitted_to_its_answers(model: BoneAgeModel) -> None:
    model.config.age_correction, model.config.interval = CORRECTION, INTERVAL
    model.resize_attention(96)
    assert (model.config.age_correction, model.config.local_calibration, model.config.interval) == (None,) * 3


def test_the_pipeline_answers_with_the_interval_around_the_corrected_months() -> None:
    pipe = load_pipeline(CHECKPOINT, device=torch.device("cpu"))
    plain = pipe(GOLDEN / "hand.png", sex="male")["bone_age_months"]
    pipe.model.config.local_calibration = LOCAL | {"slope": 1.0}
    pipe.model.config.interval = INTERVAL
    answer = pipe(GOLDEN / "hand.png", sex="male")
    assert answer["bone_age_months"] == pytest.approx(plain - 2, abs=1e-4)
    low, high = answer["interval_months"]
    assert (type(low), type(high)) == (float, float)
    assert (low, high) == pytest.approx((max(0, plain - 16), plain + 12), abs=1e-4)
