"""Splits: exact counts, the same on every machine, representative; fingerprints of label tables."""

import hashlib
import random
from fractions import Fraction

import numpy as np
import pytest

from boneage_hf.errors import InputError
from boneage_hf.splits import (
    Assignment,
    age_band,
    age_band_name,
    calibration_half,
    fingerprint,
    largest_remainder,
    reference_split,
    split_sizes,
)


def invented_labels(rows: int, *, seed: int = 0) -> tuple[list[str], list[float], list[str]]:
    """Ids, ages and sexes with about the distribution of the challenge: girls younger, few at both ends."""
    rng = np.random.default_rng(seed)
    sexes = ["male" if male else "female" for male in rng.random(rows) < 0.54]
    ages = [float(np.clip(rng.normal(135 if sex == "male" else 118, 41), 1, 228).round()) for sex in sexes]
    ids = [str(number) for number in rng.choice(np.arange(1377, 1377 + 2 * rows), size=rows, replace=False)]
    return ids, ages, sexes


def slow_share(sizes: list[int], total: int) -> list[int]:
    """Largest remainder, one seat at a time, in exact fractions."""
    rows = sum(sizes)
    exact = [Fraction(total * size, rows) if rows else Fraction(0) for size in sizes]
    seats = [int(share) for share in exact]
    while sum(seats) < total:
        best = 0
        for stratum in range(len(sizes)):
            if exact[stratum] - seats[stratum] > exact[best] - seats[best]:
                best = stratum
        seats[best] += 1
    return seats


def slow_reference_split(ids: list[str], ages: list[float], sexes: list[str], seed: int) -> dict[str, Assignment]:
    """The rule of the reference split in plain loops."""

    def digest(text: str) -> str:
        return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()

    strata: dict[str, list[str]] = {}
    for sex in ("female", "male"):
        for band in range(10):
            members = []
            for row_id, age, row_sex in zip(ids, ages, sexes, strict=True):
                low, high = 24 * band, 24 * band + 24
                if row_sex == sex and (low <= age < high or (band == 9 and age == 240)):
                    members.append(row_id)
            if members:
                strata[f"{sex}:{band}"] = sorted(members, key=digest)
    names = sorted(strata, key=digest)
    test_total = round(Fraction(1024 * len(ids), 12611))
    validation_total = round(Fraction(2129 * len(ids), 12611))
    test = slow_share([len(strata[name]) for name in names], test_total)
    left = [len(strata[name]) - seats for name, seats in zip(names, test, strict=True)]
    validation = slow_share(left, validation_total)
    calibration = slow_share(validation, validation_total // 2)
    found = {}
    for place, name in enumerate(names):
        queue = list(strata[name])
        for _ in range(test[place]):
            found[queue.pop(0)] = Assignment("test", False)
        for number in range(validation[place]):
            found[queue.pop(0)] = Assignment("validation", number < calibration[place])
        for row_id in queue:
            found[row_id] = Assignment("train", False)
    return found


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 19, 24, 60, 333])
@pytest.mark.parametrize("seed", [2017, 3])
def test_the_reference_split_is_what_plain_loops_make_of_the_rule(rows: int, seed: int) -> None:
    ids, ages, sexes = invented_labels(rows, seed=rows)
    split = reference_split(ids, ages, sexes, seed=seed)
    assert dict(zip(ids, split, strict=True)) == slow_reference_split(ids, ages, sexes, seed)


def test_the_reference_split_of_12611_rows_has_exactly_the_published_sizes() -> None:
    split = reference_split(*invented_labels(12_611))
    assert split.count(Assignment("train", False)) == 9_458
    assert split.count(Assignment("validation", False)) == 1_065
    assert split.count(Assignment("validation", True)) == 1_064
    assert split.count(Assignment("test", False)) == 1_024
    assert len(split) == 12_611


def test_the_reference_split_does_not_depend_on_the_order_of_the_rows() -> None:
    rows = list(zip(*invented_labels(500), strict=True))
    shuffled = rows.copy()
    random.Random(1).shuffle(shuffled)
    assert shuffled != rows
    straight, mixed = (
        dict(zip([row[0] for row in table], reference_split(*map(list, zip(*table, strict=True))), strict=True))
        for table in (rows, shuffled)
    )
    assert straight == mixed


def test_another_seed_makes_another_split_of_the_same_sizes() -> None:
    labels = invented_labels(500)
    first, second = reference_split(*labels, seed=1), reference_split(*labels, seed=2)
    assert first != second
    assert sorted(first) == sorted(second)


def test_every_split_has_the_ages_and_sexes_of_the_whole() -> None:
    ids, ages, sexes = invented_labels(12_611)
    split = reference_split(ids, ages, sexes)
    months, male = np.array(ages), np.array([sex == "male" for sex in sexes])
    parts: dict[str, list[int]] = {"train": [], "validation": [], "test": [], "calibration": []}
    for row, assignment in enumerate(split):
        parts[assignment.split].append(row)
        if assignment.calibration:
            parts["calibration"].append(row)
    for rows in parts.values():
        # Bands are 24 months wide; a random sample of 1,024 would have a standard error of 1.3 months and 1.6 %.
        assert abs(months[rows].mean() - months.mean()) < 1.0
        assert abs(months[rows].std() - months.std()) < 1.0
        assert abs(male[rows].mean() - male.mean()) < 0.005


def test_every_stratum_gives_its_share_of_the_test_split_to_within_one_row() -> None:
    ids, ages, sexes = invented_labels(2_000)
    split = reference_split(ids, ages, sexes)
    for sex in ("female", "male"):
        for band in range(10):
            members = [row for row in range(2_000) if sexes[row] == sex and age_band(ages[row]) == band]
            in_test = sum(split[row].split == "test" for row in members)
            assert abs(in_test - len(members) * split_sizes(2_000)[0] / 2_000) < 1


def test_an_id_that_occurs_twice_cannot_be_split() -> None:
    with pytest.raises(InputError, match="unique ids"):
        reference_split(["1", "1"], [10.0, 10.0], ["male", "male"])


def test_largest_remainder_gives_no_stratum_more_than_it_has() -> None:
    rng = random.Random(0)
    for _ in range(300):
        sizes = {name: rng.randint(0, 6) for name in range(rng.randint(1, 8))}
        total = rng.randint(0, sum(sizes.values()))
        shares = largest_remainder(sizes, total)
        assert sum(shares.values()) == total
        assert all(0 <= shares[name] <= size for name, size in sizes.items())


def test_largest_remainder_serves_equal_remainders_in_the_order_given() -> None:
    assert largest_remainder({"b": 1, "a": 1}, 1) == {"b": 1, "a": 0}


@pytest.mark.parametrize(("age", "band"), [(0.0, 0), (23.99, 0), (24.0, 1), (216.0, 9), (239.9, 9), (240.0, 9)])
def test_an_age_band_holds_its_lower_bound_and_the_last_one_both(age: float, band: int) -> None:
    assert age_band(age) == band


def test_an_age_band_is_named_by_its_bounds_in_months() -> None:
    assert [age_band_name(band) for band in (0, 9)] == ["0-24", "216-240"]


def test_the_calibration_half_is_half_and_does_not_depend_on_order() -> None:
    ids = [str(number) for number in range(1_425)]
    half = calibration_half(ids, seed=1)
    assert len(half) == 712
    assert half == calibration_half(ids[::-1], seed=1)
    assert half != calibration_half(ids, seed=2)


def test_a_fingerprint_hashes_id_and_two_decimals_line_by_line() -> None:
    expected = hashlib.sha256(b"9,12.00\n10,100.50\n").hexdigest()
    assert fingerprint(["10", "9"], [100.5, 12]) == expected
    assert fingerprint([9, 10], [12.0, 100.5]) == expected


def test_a_fingerprint_puts_other_ids_after_the_numbers() -> None:
    expected = hashlib.sha256(b"2,1.00\n10,2.00\na,3.00\nb1,4.00\n").hexdigest()
    assert fingerprint(["b1", "10", "a", "2"], [4, 2, 3, 1]) == expected


def test_a_fingerprint_tells_ages_a_hundredth_of_a_month_apart() -> None:
    assert fingerprint(["1"], [12.34]) != fingerprint(["1"], [12.35])
