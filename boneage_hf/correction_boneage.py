"""What is laid on the network's answer: a monotone correction over age, and a hospital's own offsets and slope.

Both are part of the model's forward pass, so that there is no second answer: `AutoModel`, pipeline, Space and the
evaluation loop give the corrected months, and the benchmark measures them. The training loss is that of the network's
own answer.
"""

from itertools import pairwise
from typing import Any

import torch

from .errors import InputError
from .interval_boneage import check_fields, check_numbers

#: Fields of `age_correction` and of `local_calibration` in a config.
AGE_CORRECTION_FIELDS = ("knots_months", "offsets_months")
LOCAL_CALIBRATION_FIELDS = ("offsets_months", "slope", "centre_months")

#: Slopes beyond these are no calibration: predictions and labels do not belong together.
MIN_SLOPE, MAX_SLOPE = 0.5, 2.0


def correct_months(
    months: torch.Tensor,
    sex: torch.Tensor | None,
    *,
    age_correction: dict[str, Any] | None,
    local_calibration: dict[str, Any] | None,
) -> torch.Tensor:
    """First the correction over age, then the local calibration.

    Args:
        months: (B,) float, the network's answer.
        sex: (B,) integers, 0 female and 1 male; only read where the local calibration has an offset per sex.
        age_correction: `knots_months` and `offsets_months`: the offset that is added, linear between the knots and
            constant outside of them. None adds nothing.
        local_calibration: `centre + slope * (months - centre) + offset`, with one offset, or one for each sex. None
            changes nothing.

    Returns:
        (B,) months.

    Raises:
        InputError: an offset per sex, but no sex.
    """
    if age_correction is not None:
        knots = torch.tensor(age_correction["knots_months"], dtype=months.dtype, device=months.device)
        offsets = torch.tensor(age_correction["offsets_months"], dtype=months.dtype, device=months.device)
        right = torch.searchsorted(knots, months.contiguous()).clamp(1, len(knots) - 1)
        way = (months - knots[right - 1]) / (knots[right] - knots[right - 1])
        months = months + torch.lerp(offsets[right - 1], offsets[right], way.clamp(0, 1))
    if local_calibration is not None:
        centre, slope = local_calibration["centre_months"], local_calibration["slope"]
        local = torch.tensor(local_calibration["offsets_months"], dtype=months.dtype, device=months.device)
        if len(local) == 1:
            offset = local[0]
        elif sex is None:
            raise InputError("This calibration has an offset per sex: pass each child's sex.")
        else:
            offset = local[sex]
        months = centre + slope * (months - centre) + offset
    return months


def check_age_correction(correction: dict[str, Any]) -> None:
    """Refuse what is no monotone correction: 2 or more rising `knots_months`, as many `offsets_months`, and corrected
    ages that rise with the uncorrected ones.

    Raises:
        InputError: names the field that is wrong.
    """
    check_fields(correction, "age_correction", AGE_CORRECTION_FIELDS)
    knots = check_numbers(correction["knots_months"], "age_correction: knots_months", rising=True)
    offsets = check_numbers(correction["offsets_months"], "age_correction: offsets_months")
    if len(knots) < 2 or len(knots) != len(offsets):
        raise InputError(
            f"age_correction: knots_months and offsets_months must be as many, at least 2, not {len(knots)} and "
            f"{len(offsets)}; fit it again."
        )
    corrected = [knot + offset for knot, offset in zip(knots, offsets, strict=True)]
    if any(late <= early for early, late in pairwise(corrected)):
        raise InputError("age_correction: the corrected ages must rise with the uncorrected ones; fit it again.")


def check_local_calibration(calibration: dict[str, Any], *, uses_sex: bool) -> None:
    """Refuse what is no local calibration: `offsets_months` (female and male for a model that uses sex, else one),
    `slope` from 0.5 to 2 and `centre_months`; all finite.

    Raises:
        InputError: names the field that is wrong.
    """
    check_fields(calibration, "local_calibration", LOCAL_CALIBRATION_FIELDS)
    offsets = check_numbers(calibration["offsets_months"], "local_calibration: offsets_months")
    if len(offsets) != (2 if uses_sex else 1):
        raise InputError(
            f"local_calibration: offsets_months must be {'two, female and male' if uses_sex else 'one'}, not "
            f"{len(offsets)}; fit it again."
        )
    check_numbers([calibration["centre_months"]], "local_calibration: centre_months")
    (slope,) = check_numbers([calibration["slope"]], "local_calibration: slope")
    if not MIN_SLOPE <= slope <= MAX_SLOPE:
        raise InputError(f"local_calibration: slope must lie from {MIN_SLOPE} to {MAX_SLOPE}, not {slope}; fit again.")
