"""The splits of a bone age data set, and the fingerprint that names a version of its labels.

Everything here is a pure function of ids, ages and sexes: the same table gives the same split on every machine, in
whatever order its rows come, because rows are ordered by a hash of their id and never by a random generator.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple, TypeVar

from .errors import InputError

#: Seed of the published split; the year of the challenge.
REFERENCE_SEED = 2017

#: Of the 12,611 labelled radiographs of the RSNA training set, 1,024 are the test part (the size of the reference
#: project's test set), 2,129 the validation part; the other 9,458 are for training. Half of the validation part,
#: rounded down (1,064), is reserved for calibrating intervals.
REFERENCE_ROWS = 12_611
REFERENCE_TEST_ROWS = 1_024
REFERENCE_VALIDATION_ROWS = 2_129

#: Width of the age bands that the split is stratified by, in months.
AGE_BAND_MONTHS = 24

#: Bone ages outside this range, in months, are taken for mistakes of the table.
MIN_BONE_AGE_MONTHS = 0.0
MAX_BONE_AGE_MONTHS = 240.0

_LAST_BAND = int(MAX_BONE_AGE_MONTHS) // AGE_BAND_MONTHS - 1

Stratum = TypeVar("Stratum")


class Assignment(NamedTuple):
    """Where one row goes: ``split`` is "train", "validation" or "test"; ``calibration`` is True only in validation."""

    split: str
    calibration: bool


def age_band(bone_age_months: float) -> int:
    """Index of the 24-month band of an age: 0 is [0, 24), 1 is [24, 48), ..., 9 is [216, 240] months."""
    return min(int(bone_age_months // AGE_BAND_MONTHS), _LAST_BAND)


def age_band_name(band: int) -> str:
    """``"24-48"`` for band 1: lower bound included, upper bound not, except in the last band."""
    return f"{band * AGE_BAND_MONTHS}-{(band + 1) * AGE_BAND_MONTHS}"


def id_order(row_id: str) -> tuple[int, int, str]:
    """Sort key that puts numeric ids first, as numbers, and all others after them as strings."""
    if row_id.isascii() and row_id.isdigit():
        return 0, int(row_id), row_id
    return 1, 0, row_id


def fingerprint(ids: Iterable[object], months: Iterable[float]) -> str:
    """SHA-256 (hex) of a label table, to tell versions of a ground truth apart without shipping it.

    Hashed are the lines ``id,months`` with two decimals and a line feed after each, sorted by id (numbers as numbers,
    then other ids as strings).
    """
    rows = sorted(
        zip((str(row_id) for row_id in ids), months, strict=True), key=lambda row: (*id_order(row[0]), row[1])
    )
    return hashlib.sha256("".join(f"{row_id},{age:.2f}\n" for row_id, age in rows).encode()).hexdigest()


def hash_order(row_id: str, *, seed: int) -> tuple[str, str]:
    """Sort key that orders ids as if shuffled: SHA-256 of ``"{seed}:{id}"``."""
    return hashlib.sha256(f"{seed}:{row_id}".encode()).hexdigest(), row_id


def split_sizes(rows: int) -> tuple[int, int, int]:
    """Numbers of test, validation and (within validation) calibration rows: 1024/12611, 2129/12611, half of it."""
    test = round(Fraction(rows * REFERENCE_TEST_ROWS, REFERENCE_ROWS))
    validation = round(Fraction(rows * REFERENCE_VALIDATION_ROWS, REFERENCE_ROWS))
    return test, validation, validation // 2


def largest_remainder(sizes: Mapping[Stratum, int], total: int) -> dict[Stratum, int]:
    """Share ``total`` out over strata in proportion to their sizes (Hamilton's method, exact integers).

    No stratum gets more than its size. Equal remainders are served in the order of ``sizes``.
    """
    rows = sum(sizes.values())
    if total == 0:
        return dict.fromkeys(sizes, 0)
    quotas = {stratum: total * size // rows for stratum, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda stratum: -(total * sizes[stratum] % rows))
    for stratum in by_remainder[: total - sum(quotas.values())]:
        quotas[stratum] += 1
    return quotas


def reference_split(
    ids: Sequence[str], bone_age_months: Sequence[float], sex: Sequence[str], *, seed: int = REFERENCE_SEED
) -> list[Assignment]:
    """Split labelled rows into train, validation (half of it for calibration) and test.

    Strata are sex x 24-month age band. The exact totals of :func:`split_sizes` are shared out over the strata by the
    largest remainder: first test, then validation over what is left, then calibration over validation; equal
    remainders are served in the order of SHA-256 of ``"{seed}:{sex}:{band}"``. Inside a stratum the rows are ordered
    by :func:`hash_order` and taken in that order.

    Args:
        ids: unique ids, N of them.
        bone_age_months: N ages in 0..240 months.
        sex: N times "female" or "male".
        seed: goes into the hash.

    Returns:
        N assignments in the order of ``ids``; they do not depend on that order.

    Raises:
        InputError: if an id occurs twice.
    """
    if len(set(ids)) != len(ids):
        raise InputError("A split needs unique ids; remove the duplicated rows first.")
    strata: dict[tuple[str, int], list[int]] = defaultdict(list)
    for row, (months, row_sex) in enumerate(zip(bone_age_months, sex, strict=True)):
        strata[row_sex, age_band(months)].append(row)
    # Equal remainders are the rule in small balanced tables: without the hash one sex would always be served first.
    names = sorted(strata, key=lambda name: hash_order(f"{name[0]}:{name[1]}", seed=seed))
    test_rows, validation_rows, calibration_rows = split_sizes(len(ids))
    test = largest_remainder({name: len(strata[name]) for name in names}, test_rows)
    validation = largest_remainder({name: len(strata[name]) - test[name] for name in names}, validation_rows)
    calibration = largest_remainder(validation, calibration_rows)

    assignments: dict[int, Assignment] = {}
    for name in names:
        ordered = sorted(strata[name], key=lambda row: hash_order(ids[row], seed=seed))
        first_validation, first_train = test[name], test[name] + validation[name]
        for place, row in enumerate(ordered):
            if place < first_validation:
                assignments[row] = Assignment("test", False)
            elif place < first_train:
                assignments[row] = Assignment("validation", place - first_validation < calibration[name])
            else:
                assignments[row] = Assignment("train", False)
    return [assignments[row] for row in range(len(ids))]


def calibration_half(ids: Sequence[str], *, seed: int = REFERENCE_SEED) -> set[str]:
    """The ids of a given validation part that are reserved for calibration: the first half, in hash order."""
    return set(sorted(ids, key=lambda row_id: hash_order(row_id, seed=seed))[: len(ids) // 2])
