"""An answer of the pipeline in a person's words, or as JSON: the only place where bone age is put in years."""

import math
from collections.abc import Mapping
from typing import Any

from .errors import InputError

DISCLAIMER = "Research use only, not a medical device."

#: Share of reference bone ages that `interval_months` of an answer is calibrated to hold, in percent.
INTERVAL_PERCENT = 90


def format_age(months: float) -> str:
    """Bone age in years and months, rounded to whole months (halves go up): `"10 years 3 months"`, `"8 months"`.

    A model's answer may lie below zero, which is no age: `"below 0 months"`.

    Args:
        months: bone age in months.

    Raises:
        InputError: `months` is not a finite number.
    """
    whole = math.floor(_finite(months) + 0.5)
    if whole < 0:
        return "below 0 months"
    years, rest = divmod(whole, 12)
    return f"{_counted(years, 'year')} {_counted(rest, 'month')}" if years else _counted(rest, "month")


def format_months(months: float) -> str:
    """Months to one decimal: `"123.4 months"`.

    Raises:
        InputError: `months` is not a finite number.
    """
    return f"{_finite(months):z.1f} months"


def answer_as_text(answer: Mapping[str, Any]) -> str:
    """One line: `"bone age 10 years 3 months (123.4 months), 90 % interval not available"`.

    Args:
        answer: of [`BoneAgePipeline`] for one image.

    Raises:
        InputError: a number of the answer is not finite.
    """
    age = answer["bone_age_months"]
    text = f"bone age {format_age(age)} ({format_months(age)}), {INTERVAL_PERCENT} % interval "
    if answer["interval_months"] is None:
        return text + "not available"
    low, high = answer["interval_months"]
    return f"{text}{format_age(low)} to {format_age(high)} ({_finite(low):z.1f} to {format_months(high)})"


def answer_as_json(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What `json.dumps` can write of an answer: `bone_age_months`, `interval_months`, `sex`; months to two decimals.

    Args:
        answer: of [`BoneAgePipeline`] for one image.

    Raises:
        InputError: a number of the answer is not finite (JSON has no such numbers).
    """
    interval = answer["interval_months"]
    return {
        "bone_age_months": _rounded(answer["bone_age_months"]),
        "interval_months": None if interval is None else [_rounded(end) for end in interval],
        "sex": answer["sex"],
    }


def _rounded(months: float) -> float:
    return round(_finite(months), 2) + 0.0  # no -0.0


def _finite(months: float) -> float:
    value = float(months)
    if not math.isfinite(value):
        raise InputError("The bone age is not a finite number: the checkpoint is damaged; load another.")
    return value


def _counted(count: int, unit: str) -> str:
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"
