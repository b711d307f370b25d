"""Bone age and chronological age -> standard deviation score; delayed, normal or advanced only where that is decided.

The score is (bone age - chronological age) / SD, with the SD of the Brush Foundation table for the child's sex and
chronological age, linearly interpolated. It therefore compares with the chronological age itself, not with the
table's mean skeletal age, which differs from it by up to 7 months.
"""

import csv
import math
from calendar import monthrange
from dataclasses import dataclass
from datetime import date, datetime
from functools import cache
from importlib.resources import files
from typing import Literal

from .errors import InputError
from .sex import SEXES, Sex, parse_sex

Verdict = Literal["delayed", "normal", "advanced"]

#: Where the standard deviations come from, as a report names it.
REFERENCE = "Brush Foundation table (Greulich and Pyle, Radiographic Atlas, 2nd edition, 1959)"

#: Below -2 SD a bone age is called delayed, above +2 SD advanced (Greulich and Pyle 1959, as commonly applied).
LIMIT_SDS = 2.0

#: Chronological ages above this are refused as a mistake: 20 years. It is beyond every table of skeletal age.
OLDEST_MONTHS = 240.0


@dataclass(frozen=True)
class GrowthTable:
    """The rows of one sex, by rising age; all in months.

    Args:
        age_months: chronological ages of the rows.
        mean_months: mean skeletal age of the children of that age.
        sd_months: its standard deviation.
    """

    age_months: tuple[float, ...]
    mean_months: tuple[float, ...]
    sd_months: tuple[float, ...]

    def holds(self, age_months: float) -> bool:
        """Whether an age lies within the table, its two ends included."""
        return self.age_months[0] <= age_months <= self.age_months[-1]

    def mean_at(self, age_months: float) -> float:
        """Mean skeletal age at an age within the table, linearly interpolated."""
        return _interpolated(age_months, self.age_months, self.mean_months)

    def sd_at(self, age_months: float) -> float:
        """Standard deviation at an age within the table, linearly interpolated."""
        return _interpolated(age_months, self.age_months, self.sd_months)


@dataclass(frozen=True)
class Assessment:
    """A bone age beside a chronological age.

    Args:
        bone_age_months: as given.
        interval_months: as given; lower and upper end of the bone age.
        sex: as given.
        chronological_age_months: as given.
        sds: standard deviation score of the bone age; None without a chronological age within the table.
        sds_interval: the scores of the two ends of the interval; None without a score or an interval.
        verdict: `"delayed"`, `"normal"` or `"advanced"` where the whole of `sds_interval` lies on one side of each
            limit, else None.
        statement: one sentence for a person: score, range and verdict, or why there is none.
        reference: the table, by name.
        mean_skeletal_age_months: of the table at this age; None where there is no score.
        sd_months: of the table at this age; None where there is no score.
    """

    bone_age_months: float
    interval_months: tuple[float, float] | None
    sex: Sex
    chronological_age_months: float | None
    sds: float | None
    sds_interval: tuple[float, float] | None
    verdict: Verdict | None
    statement: str
    reference: str = REFERENCE
    mean_skeletal_age_months: float | None = None
    sd_months: float | None = None


def assess(
    *,
    bone_age_months: float,
    interval_months: tuple[float, float] | None,
    sex: Sex,
    chronological_age_months: float | None,
) -> Assessment:
    """Compare a bone age with the chronological age.

    Without an interval the score stands alone: how far the reading may be off is not known, so nothing is decided.

    Args:
        bone_age_months: predicted or read bone age.
        interval_months: its lower and upper end, or None where they are not known.
        sex: `"female"` or `"male"`.
        chronological_age_months: 0 to 240, or None where it is not known.

    Raises:
        InputError: a number is not finite, the interval's ends are in the wrong order, `sex` is neither of the two, or
            the chronological age is negative or above 20 years.
    """
    sex = parse_sex(sex)
    bone_age = _finite(bone_age_months, "The bone age")
    interval = None if interval_months is None else _checked_interval(interval_months)

    if chronological_age_months is None:
        reason = "There is no standard deviation score: the chronological age was not given."
        return Assessment(bone_age, interval, sex, None, None, None, None, reason)
    age = check_chronological_age(chronological_age_months)
    table = growth_table(sex)
    if not table.holds(age):
        youngest, oldest = table.age_months[0], table.age_months[-1]
        children, side = "girls" if sex == "female" else "boys", "younger" if age < youngest else "older"
        reason = (
            f"There is no standard deviation score: the Brush Foundation table of {children}"
            f" covers {youngest:g} to {oldest:g} months, and this child is {side}."
        )
        return Assessment(bone_age, interval, sex, age, None, None, None, reason)
    sd = table.sd_at(age)
    sds = (bone_age - age) / sd
    ends = None if interval is None else ((interval[0] - age) / sd, (interval[1] - age) / sd)
    verdict = None if ends is None else _verdict(*ends)
    return Assessment(
        bone_age_months=bone_age,
        interval_months=interval,
        sex=sex,
        chronological_age_months=age,
        sds=sds,
        sds_interval=ends,
        verdict=verdict,
        statement=_statement(sds, ends, verdict),
        mean_skeletal_age_months=table.mean_at(age),
        sd_months=sd,
    )


def chronological_age_months(birth: date, study: date) -> float:
    """Age on the day of the study: completed months, plus the share of the running month that has passed.

    Whoever is born on a day that a month lacks completes the month on its last day.

    Args:
        birth: date of birth.
        study: date of the radiograph.

    Raises:
        InputError: the study lies before the birth, more than 20 years after it, or in the year 9999, which is typed
            for a date that is not known and whose last month has no next one. The message names no date.
    """
    birth, study = _day(birth), _day(study)
    if study < birth:
        raise InputError("The study date lies before the birth date; check the two dates.")
    if study.year == date.max.year:
        raise InputError("The study date lies in the last year of the calendar; check the two dates.")
    completed = 12 * (study.year - birth.year) + study.month - birth.month
    if _months_after(birth, completed) > study:
        completed -= 1
    begun, ends = _months_after(birth, completed), _months_after(birth, completed + 1)
    return check_chronological_age(completed + (study - begun).days / (ends - begun).days)


def age_from_years_and_months(years: float | None, months: float | None) -> float | None:
    """A typed age in months; None where neither is given.

    Raises:
        InputError: one of them is negative, the months are 12 or more beside years, or the age is above 20 years.
    """
    if years is None and months is None:
        return None
    if min(years or 0.0, months or 0.0) < 0:
        raise InputError("The chronological age cannot be negative; give the age at the study in years and months.")
    if years and months is not None and months >= 12:
        raise InputError("Beside years there are at most 11 months; carry twelve of them over into the years.")
    return check_chronological_age(12 * (years or 0.0) + (months or 0.0))


def age_from_typed_dates(birth: str, study: str) -> float | None:
    """The age on the day of the study from two typed dates (year-month-day); None where neither is given.

    Raises:
        InputError: one of them is missing or no date, or `chronological_age_months` refuses them. No date is named.
    """
    if not birth.strip() and not study.strip():
        return None
    days = []
    for text, name in ((birth, "birth"), (study, "study")):
        try:
            days.append(date.fromisoformat(text.strip()))
        except ValueError:
            raise InputError(f"The date of {name} is missing or no date; write it as year-month-day.") from None
    return chronological_age_months(*days)


def check_chronological_age(months: float) -> float:
    """Return a chronological age that may be one.

    Raises:
        InputError: it is not a finite number, negative, or above 20 years.
    """
    age = _finite(months, "The chronological age")
    if age < 0:
        raise InputError("The chronological age cannot be negative; give the age at the study in months.")
    if age > OLDEST_MONTHS:
        raise InputError(
            "The chronological age is over 20 years (240 months), beyond any reading of bone age; check the dates, "
            "and that the age is in months."
        )
    return age


@cache
def growth_table(sex: Sex) -> GrowthTable:
    """The Brush Foundation table of one sex: 3 to 204 months for boys, 3 to 192 months for girls."""
    content = (files(__package__) / "references" / "brush_foundation.csv").read_text(encoding="utf-8")
    lines = [line for line in content.splitlines() if not line.startswith("#")]
    code = dict(zip(SEXES, "FM", strict=True))[sex]
    rows = [row for row in csv.DictReader(lines) if row["sex"] == code]

    def column(name: str) -> tuple[float, ...]:
        return tuple(float(row[name]) for row in rows)

    return GrowthTable(column("age_months"), column("mean_skeletal_age_months"), column("sd_months"))


def _verdict(low: float, high: float) -> Verdict | None:
    if high < -LIMIT_SDS:
        return "delayed"
    if low > LIMIT_SDS:
        return "advanced"
    return "normal" if low >= -LIMIT_SDS and high <= LIMIT_SDS else None


def _statement(sds: float, ends: tuple[float, float] | None, verdict: Verdict | None) -> str:
    score = f"Standard deviation score {sds:+z.2f}"
    if ends is None:
        return f"{score}; without an interval of the bone age it is not decided whether it is delayed or advanced."
    score += f" (range {ends[0]:+z.2f} to {ends[1]:+z.2f})"
    if verdict is None:
        return f"{score}: not decided at this precision, because the range reaches across a limit of -2 or +2."
    side = {"delayed": "lies below -2", "normal": "lies between -2 and +2", "advanced": "lies above +2"}[verdict]
    return f"{score}: {verdict}, because the whole range {side}."


def _checked_interval(interval: tuple[float, float]) -> tuple[float, float]:
    low, high = (_finite(end, "An end of the interval") for end in interval)
    if low > high:
        raise InputError("The interval's lower end lies above its upper end; give (low, high) in months.")
    return low, high


def _interpolated(age: float, ages: tuple[float, ...], values: tuple[float, ...]) -> float:
    """`age` must lie between the first and the last of `ages`."""
    above = next(position for position, known in enumerate(ages) if known >= age)
    if above == 0:
        return values[0]
    share = (age - ages[above - 1]) / (ages[above] - ages[above - 1])
    return values[above - 1] + share * (values[above] - values[above - 1])


def _months_after(birth: date, months: int) -> date:
    year, month = divmod(birth.year * 12 + birth.month - 1 + months, 12)
    return date(year, month + 1, min(birth.day, monthrange(year, month + 1)[1]))


def _day(moment: date) -> date:
    return moment.date() if isinstance(moment, datetime) else moment


def _finite(value: float, name: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise InputError(f"{name} is not a finite number; give it in months.")
    return number
