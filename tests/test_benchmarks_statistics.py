"""Paired tests on errors, each beside a slow and obvious reference."""

import itertools
import math

import numpy as np
import pytest

from benchmarks.statistics import holm, n_needed, paired_bootstrap, wilcoxon
from boneage_hf.errors import InputError


def drawn_errors(n: int, *, scale: float = 10.0, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, n)


def test_the_difference_of_two_maes_and_its_interval_are_those_of_a_plain_loop() -> None:
    a, b = drawn_errors(40), drawn_errors(40, scale=7, seed=2)
    generator, means = np.random.default_rng(3), []
    for _ in range(300):
        drawn = generator.integers(0, 40, size=40)
        means.append(sum(abs(a[i]) for i in drawn) / 40 - sum(abs(b[i]) for i in drawn) / 40)
    found = paired_bootstrap(a, b, draws=300, seed=3)
    assert found.n == 40
    assert found.difference_months == pytest.approx(np.abs(a).mean() - np.abs(b).mean())
    assert (found.low_months, found.high_months) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))


def test_blocks_of_draws_give_what_one_block_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = drawn_errors(30), drawn_errors(30, seed=2)
    whole = paired_bootstrap(a, b, draws=100, seed=0)
    monkeypatch.setattr("benchmarks.statistics._BLOCK_ELEMENTS", 30 * 7)
    assert paired_bootstrap(a, b, draws=100, seed=0) == whole


def test_a_paired_interval_covers_the_true_difference_about_as_often_as_it_says() -> None:
    """|N(0, 10)| has the mean 10 sqrt(2 / pi); b errs on the same images, with a share of its own."""
    true, covered = (10 - 8) * math.sqrt(2 / math.pi), 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        shared = generator.normal(0, 1, 150)
        own = 0.6 * shared + 0.8 * generator.normal(0, 1, 150)
        found = paired_bootstrap(10 * shared, 8 * own, draws=300, seed=seed)
        covered += found.low_months <= true <= found.high_months
    assert 180 <= covered <= 199


def test_the_signed_rank_test_is_exact_on_few_images() -> None:
    a, b = np.array([9.0, 2, 14, 5, 8, 11]), np.array([-1.0, 4, 5, -1, 5, 10.5])
    gained = np.abs(a) - np.abs(b)
    ranks = np.abs(gained).argsort().argsort() + 1
    centre = ranks.sum() / 2
    observed = abs(ranks[gained > 0].sum() - centre)
    sums = [np.dot(signs, ranks) for signs in itertools.product((0, 1), repeat=6)]
    expected = np.mean([abs(value - centre) >= observed for value in sums])
    assert wilcoxon(a, b) == pytest.approx(expected)


def test_systems_that_err_alike_have_the_p_value_one() -> None:
    errors = drawn_errors(20)
    assert wilcoxon(errors, -errors) == 1.0
    assert paired_bootstrap(errors, -errors, draws=50, seed=0).high_months == 0
    assert n_needed(errors, -errors) is None


def test_holm_is_the_step_down_of_its_paper() -> None:
    p_values = [0.01, 0.04, 0.03, 0.005, 0.9]

    def slow(p: float) -> float:
        """The largest step factor times p of all hypotheses that stand no later than this one."""
        ordered = sorted(p_values)
        steps = [min(1.0, (5 - i) * q) for i, q in enumerate(ordered) if q <= p]
        return max(steps)

    assert holm(p_values) == pytest.approx([slow(p) for p in p_values])
    assert holm(p_values) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.9])
    assert holm([]) == []
    assert holm([0.02, 0.02]) == pytest.approx([0.04, 0.04])


def test_holm_refuses_what_is_no_p_value() -> None:
    for wrong in ([1.1], [-0.1], [math.nan]):
        with pytest.raises(InputError, match="between 0 and 1"):
            holm(wrong)


def test_the_images_needed_find_the_difference_with_the_promised_power() -> None:
    """Simulated: as often as promised, a z-test on n differences rejects; half as many images find it less often."""
    gained = np.array([-3.0, 5.0, 1.0, -1.0, 3.0, 1.0])
    a, b = gained + 10, np.full(6, 10.0)
    n = n_needed(a, b, alpha=0.05, power=0.8)
    assert n is not None
    mean, deviation = gained.mean(), gained.std(ddof=1)
    generator = np.random.default_rng(0)

    def power(images: int) -> float:
        means = generator.normal(mean, deviation, (4000, images)).mean(axis=1)
        return float((np.abs(means) > 1.959964 * deviation / math.sqrt(images)).mean())

    assert power(n) == pytest.approx(0.8, abs=0.03)
    assert power(n // 2) < 0.6


def test_the_images_needed_do_not_depend_on_the_order_and_grow_with_a_stricter_level() -> None:
    a, b = drawn_errors(50), drawn_errors(50, scale=8, seed=2)
    needed, stricter = n_needed(a, b), n_needed(a, b, alpha=0.01)
    assert needed is not None
    assert stricter is not None
    assert needed == n_needed(b, a)
    assert stricter > needed


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1.0, 2.0], [1.0], "same images"),
        ([], [], "at least one"),
        ([1.0, math.nan], [1.0, 2.0], "NaN"),
        ([[1.0]], [[1.0]], "one number per image"),
    ],
)
def test_errors_that_do_not_pair_are_refused(a: list[float], b: list[float], message: str) -> None:
    for test in (paired_bootstrap, wilcoxon, n_needed):
        with pytest.raises(InputError, match=message):
            test(a, b)
