"""How an answer reads: months, years where a person reads, and JSON."""

import json
import math
from typing import Any

import numpy as np
import pytest

from boneage_hf.errors import InputError
from boneage_hf.report import DISCLAIMER, answer_as_json, answer_as_text, format_age, format_months


def answer(months: float, *, interval: list[float] | None = None, sex: str | None = "female") -> dict[str, Any]:
    return {
        "bone_age_months": months,
        "interval_months": interval,
        "attention": np.zeros((2, 2), dtype=np.float32),
        "sex": sex,
    }


@pytest.mark.parametrize(
    ("months", "text"),
    [
        (0.0, "0 months"),
        (1.0, "1 month"),
        (8.2, "8 months"),
        (12.0, "1 year 0 months"),
        (13.0, "1 year 1 month"),
        (123.4, "10 years 3 months"),
        (228.0, "19 years 0 months"),
    ],
)
def test_an_age_is_put_in_years_and_months(months: float, text: str) -> None:
    assert format_age(months) == text


@pytest.mark.parametrize(
    ("months", "text"), [(11.49, "11 months"), (11.5, "1 year 0 months"), (12.5, "1 year 1 month")]
)
def test_half_a_month_is_rounded_up_even_into_a_year(months: float, text: str) -> None:
    assert format_age(months) == text


def test_rounding_never_gives_twelve_months_beside_the_years() -> None:
    for tenths in range(2401):
        words = format_age(tenths / 10).split()
        total = sum(
            int(n) * (12 if unit.startswith("year") else 1) for n, unit in zip(words[::2], words[1::2], strict=True)
        )
        assert total == math.floor(tenths / 10 + 0.5)
        assert int(words[-2]) < 12


def test_an_answer_below_zero_is_called_that_and_not_an_age() -> None:
    assert format_age(-0.4) == "0 months"
    assert format_age(-7.0) == "below 0 months"
    assert format_months(-7.0) == "-7.0 months"


def test_months_have_one_decimal_and_no_negative_zero() -> None:
    assert format_months(123.44) == "123.4 months"
    assert format_months(-0.01) == "0.0 months"


def test_numpy_numbers_are_printed_like_any_other() -> None:
    number: Any = np.float32(123.4)
    assert format_age(number) == "10 years 3 months"
    assert format_months(number) == "123.4 months"


def test_an_answer_without_an_interval_says_so() -> None:
    text = "bone age 10 years 3 months (123.4 months), 90 % interval not available"
    assert answer_as_text(answer(123.4)) == text


def test_an_interval_is_given_in_years_and_in_months() -> None:
    text = answer_as_text(answer(123.4, interval=[108.06, 138.72]))
    assert text.endswith("90 % interval 9 years 0 months to 11 years 7 months (108.1 to 138.7 months)")


def test_json_holds_months_to_two_decimals_and_no_array() -> None:
    low: Any = np.float32(108.0612)
    given = answer(123.456789, interval=[low, 138.7288])
    assert answer_as_json(given) == {
        "bone_age_months": 123.46,
        "interval_months": [108.06, 138.73],
        "sex": "female",
    }
    assert json.loads(json.dumps(answer_as_json(given))) == answer_as_json(given)


def test_json_says_null_for_what_is_not_known() -> None:
    assert json.dumps(answer_as_json(answer(60.0, sex=None))) == (
        '{"bone_age_months": 60.0, "interval_months": null, "sex": null}'
    )


@pytest.mark.parametrize("months", [math.nan, math.inf, -math.inf])
def test_an_age_that_is_no_number_is_refused(months: float) -> None:
    for write in (format_age, format_months):
        with pytest.raises(InputError, match="not a finite number"):
            write(months)
    with pytest.raises(InputError, match="not a finite number"):
        answer_as_json(answer(months))
    with pytest.raises(InputError, match="not a finite number"):
        answer_as_text(answer(60.0, interval=[50.0, months]))


def test_the_disclaimer_names_research() -> None:
    assert DISCLAIMER == "Research use only, not a medical device."
