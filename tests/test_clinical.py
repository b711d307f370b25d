"""The standard deviation score, what it decides and what it leaves open."""

import csv
import math
from datetime import date, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import boneage_hf.clinical
from boneage_hf.clinical import (
    REFERENCE,
    Assessment,
    age_from_typed_dates,
    age_from_years_and_months,
    assess,
    check_chronological_age,
    chronological_age_months,
    growth_table,
)
from boneage_hf.errors import InputError
from boneage_hf.sex import SEXES, Sex

TABLE = Path(boneage_hf.clinical.__file__).parent / "references" / "brush_foundation.csv"


def of(
    bone_age: float, age: float | None, *, interval: tuple[float, float] | None = None, sex: Sex = "female"
) -> Assessment:
    return assess(bone_age_months=bone_age, interval_months=interval, sex=sex, chronological_age_months=age)


def slow_sds(bone_age: float, age: float, sex: Sex) -> float:
    """Straight from the file: the two rows around the age and the line between them."""
    rows = [row for row in csv.reader(TABLE.read_text(encoding="utf-8").splitlines()) if row[0] == sex[0].upper()]
    for before, after in pairwise(rows):
        low, high = float(before[1]), float(after[1])
        if low <= age <= high:
            sd = (float(before[3]) * (high - age) + float(after[3]) * (age - low)) / (high - low)
            return (bone_age - age) / sd
    raise AssertionError("outside the table")


# --- the table ------------------------------------------------------------------------------------------------------


def test_the_table_opens_with_its_source() -> None:
    first, header = TABLE.read_text(encoding="utf-8").splitlines()[:2]
    assert first.startswith("# Brush Foundation")
    assert "1959" in first
    assert header == "sex,age_months,mean_skeletal_age_months,sd_months"


@pytest.mark.parametrize(("sex", "rows", "last"), [("male", 24, 204), ("female", 23, 192)])
def test_the_table_runs_from_3_months_to_the_last_age_of_its_sex(sex: Sex, rows: int, last: float) -> None:
    table = growth_table(sex)
    assert len(table.age_months) == len(table.mean_months) == len(table.sd_months) == rows
    assert (table.age_months[0], table.age_months[-1]) == (3, last)
    assert list(table.age_months) == sorted(set(table.age_months))
    assert min(table.sd_months) > 0


@pytest.mark.parametrize(
    ("sex", "age", "mean", "sd"),
    [("male", 120, 125.68, 9.79), ("female", 120, 125.66, 11.73), ("male", 3, 3.01, 0.69)],
)
def test_known_rows_are_in_the_table(sex: Sex, age: float, mean: float, sd: float) -> None:
    assert growth_table(sex).mean_at(age) == mean
    assert growth_table(sex).sd_at(age) == sd


def test_the_mean_differs_from_the_age_by_up_to_7_months() -> None:
    tables = [growth_table(sex) for sex in SEXES]
    widest = max(abs(m - a) for table in tables for a, m in zip(table.age_months, table.mean_months, strict=True))
    assert 6 < widest < 7


# --- the score ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sex", SEXES)
def test_the_score_equals_the_slow_reference_at_every_age(sex: Sex) -> None:
    table = growth_table(sex)
    for tenths in range(int(10 * table.age_months[0]), int(10 * table.age_months[-1]) + 1):
        age = tenths / 10
        assert of(100.0, age, sex=sex).sds == pytest.approx(slow_sds(100.0, age, sex), abs=1e-12)


def test_a_worked_example() -> None:
    """A girl of 10 years 6 months: the SD lies halfway between 11.73 and 11.94."""
    found = of(102.0, 126.0, interval=(90.0, 114.0))
    assert found.sd_months == pytest.approx(11.835)
    assert found.sds == pytest.approx(-24 / 11.835)
    assert found.sds_interval == pytest.approx((-36 / 11.835, -12 / 11.835))
    assert found.mean_skeletal_age_months == pytest.approx((125.66 + 137.86) / 2)
    assert found.reference == REFERENCE


def test_boys_and_girls_have_tables_of_their_own() -> None:
    assert of(100, 180, sex="female").sds != of(100, 180, sex="male").sds


# --- what it decides ------------------------------------------------------------------------------------------------

SD = 11.73  # girls of 120 months


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-4.0, -2.01, "delayed"),
        (-4.0, -1.99, None),
        (-1.99, 1.99, "normal"),
        (-2.01, 0.0, None),
        (0.0, 2.01, None),
        (-2.5, 2.5, None),
        (2.01, 4.0, "advanced"),
        (1.99, 4.0, None),
    ],
)
def test_a_verdict_needs_the_whole_range_on_one_side_of_the_limits(
    low: float, high: float, verdict: str | None
) -> None:
    found = of(120 + (low + high) / 2 * SD, 120, interval=(120 + low * SD, 120 + high * SD))
    assert found.verdict == verdict
    if verdict is None:
        assert "not decided at this precision" in found.statement
    else:
        assert f": {verdict}, because the whole range lies " in found.statement


def test_a_limit_itself_is_still_normal() -> None:
    assert growth_table("male").sd_at(108) == 9.0
    assert of(108.0, 108, interval=(90.0, 126.0), sex="male").verdict == "normal"


def test_a_score_far_out_stays_undecided_if_its_range_is_wide() -> None:
    found = of(120 - 2.5 * SD, 120, interval=(120 - 4 * SD, 120 - SD))
    assert found.sds == pytest.approx(-2.5)
    assert found.verdict is None
    assert found.statement == (
        "Standard deviation score -2.50 (range -4.00 to -1.00): not decided at this precision, because the range "
        "reaches across a limit of -2 or +2."
    )


@pytest.mark.parametrize("bone_age", [60.0, 120.0, 180.0])
def test_without_an_interval_there_is_a_score_and_no_verdict(bone_age: float) -> None:
    found = of(bone_age, 120)
    assert found.sds == pytest.approx((bone_age - 120) / SD)
    assert found.sds_interval is None
    assert found.verdict is None
    assert "not decided" in found.statement
    assert "without an interval" in found.statement


def test_without_a_chronological_age_the_statement_says_so() -> None:
    found = of(100.0, None, interval=(90, 110))
    assert (found.sds, found.sds_interval, found.verdict, found.sd_months) == (None, None, None, None)
    assert found.statement == "There is no standard deviation score: the chronological age was not given."


@pytest.mark.parametrize(
    ("age", "sex", "inside"),
    [
        (2.99, "male", False),
        (3.0, "male", True),
        (204.0, "male", True),
        (204.01, "male", False),
        (192.0, "female", True),
        (192.01, "female", False),
        (0.0, "female", False),
        (240.0, "male", False),
    ],
)
def test_outside_the_table_there_is_no_score_and_the_reason_is_given(age: float, sex: Sex, inside: bool) -> None:
    found = of(100.0, age, interval=(90, 110), sex=sex)
    assert (found.sds is not None) == inside
    if not inside:
        assert (found.sds_interval, found.verdict) == (None, None)
        last = {"male": "boys covers 3 to 204 months", "female": "girls covers 3 to 192 months"}
        assert last[sex] in found.statement
        assert ("younger" if age < 3 else "older") in found.statement


def test_every_statement_is_one_sentence() -> None:
    for found in (of(100, 120), of(100, None), of(100, 1), of(100, 120, interval=(80, 110)), of(120, 120.0)):
        assert found.statement.endswith(".")
        assert ". " not in found.statement


def test_a_score_of_zero_has_no_minus() -> None:
    assert "score +0.00" in of(119.99, 120).statement


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("age", "message"), [(-0.1, "negative"), (240.1, "over 20 years"), (math.nan, "finite"), (math.inf, "finite")]
)
def test_a_chronological_age_that_cannot_be_is_refused(age: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        of(100.0, age)
    with pytest.raises(InputError, match=message):
        check_chronological_age(age)


@pytest.mark.parametrize("sex", [None, "F", "Male", ""])
def test_sex_is_never_guessed(sex: Any) -> None:
    with pytest.raises(InputError, match="sex must be exactly"):
        of(100.0, 120.0, sex=sex)


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(InputError, match="bone age is not a finite"):
        of(math.nan, 120.0)
    with pytest.raises(InputError, match="end of the interval"):
        of(100.0, 120.0, interval=(90.0, math.inf))
    with pytest.raises(InputError, match="lower end"):
        of(100.0, 120.0, interval=(110.0, 90.0))


# --- age from two dates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("birth", "study", "months"),
    [
        (date(2010, 5, 17), date(2010, 5, 17), 0),
        (date(2010, 5, 17), date(2010, 6, 17), 1),
        (date(2010, 5, 17), date(2020, 5, 17), 120),
        (date(2010, 5, 17), date(2020, 5, 16), 119 + 29 / 30),
        (date(2010, 12, 31), date(2011, 2, 28), 2),
        (date(2012, 2, 29), date(2013, 2, 28), 12),
        (date(2012, 2, 29), date(2032, 2, 29), 240),
        (date(2010, 1, 1), date(2010, 1, 16), 15 / 31),
    ],
)
def test_age_is_counted_in_completed_months_and_the_share_of_the_running_one(
    birth: date, study: date, months: float
) -> None:
    assert chronological_age_months(birth, study) == pytest.approx(months, abs=1e-12)


@pytest.mark.parametrize("birth", [date(2011, 1, 31), date(2012, 2, 29), date(2010, 6, 15)])
def test_age_rises_every_day_and_stays_within_a_day_or_two_of_the_mean_month(birth: date) -> None:
    before = -1.0
    for day in range(7000):
        months = chronological_age_months(birth, birth + timedelta(days=day))
        assert months > before
        assert abs(months - day / 30.4375) < 0.12
        before = months


def test_a_moment_counts_as_its_day() -> None:
    assert chronological_age_months(datetime(2010, 1, 1, 23, 59), date(2010, 2, 1)) == 1
    assert chronological_age_months(date(2010, 1, 1), datetime(2010, 2, 1, 0, 1)) == 1


def test_a_study_before_birth_is_refused_without_naming_a_date() -> None:
    with pytest.raises(InputError, match="before the birth date") as refused:
        chronological_age_months(date(2010, 5, 17), date(2010, 5, 16))
    assert "2010" not in str(refused.value)


def test_a_study_after_20_years_is_refused() -> None:
    with pytest.raises(InputError, match="over 20 years"):
        chronological_age_months(date(2000, 5, 17), date(2020, 5, 18))


# --- typed ages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("years", "months", "expected"),
    [(None, None, None), (9, None, 108.0), (None, 30.0, 30.0), (9, 2.5, 110.5), (0, 0, 0.0), (20, 0, 240.0)],
)
def test_years_and_months_are_added_up(years: float | None, months: float | None, expected: float | None) -> None:
    assert age_from_years_and_months(years, months) == expected


@pytest.mark.parametrize(
    ("years", "months", "part"),
    [
        (-1, None, "negative"),
        (1, -1, "negative"),
        (9, 12, "at most 11"),
        (20, 1, "over 20 years"),
        (None, 300, "over"),
    ],
)
def test_impossible_years_and_months_are_refused(years: float | None, months: float | None, part: str) -> None:
    with pytest.raises(InputError, match=part):
        age_from_years_and_months(years, months)


def test_typed_dates_give_the_age_on_the_day_of_the_study() -> None:
    assert age_from_typed_dates("2015-03-01", " 2019-05-01 ") == 50.0
    assert age_from_typed_dates("", " ") is None


@pytest.mark.parametrize(
    ("birth", "study", "part"),
    [
        ("2015-03-01", "", "date of study is missing"),
        ("1.3.2015", "2019-05-01", "date of birth is missing or no date"),
        ("2015-02-30", "2019-05-01", "date of birth"),
        ("2019-05-02", "2019-05-01", "lies before the birth"),
        ("1990-05-02", "2019-05-01", "over 20 years"),
        ("9999-12-01", "9999-12-31", "last year of the calendar"),
    ],
)
def test_typed_dates_that_give_no_age_are_refused_without_naming_them(birth: str, study: str, part: str) -> None:
    with pytest.raises(InputError, match=part) as refusal:
        age_from_typed_dates(birth, study)
    assert not any(day and day in str(refusal.value) for day in (birth, study))
