"""Intervals: they hold the truth as often as they say, and pairs are compared as pairs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from mimco_deploy.evaluation.measures import _student_t, difference, mean_of, statistic_of


@pytest.mark.parametrize(("count", "share"), [(100, 0.3), (100, 0.97), (12, 0.9)])
def test_the_interval_of_a_share_holds_it_nineteen_times_of_twenty(count: int, share: float) -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        measure = mean_of("p", "n", rng.random(count) < share)
        held += measure.low <= share <= measure.high
    assert held / 200 >= 0.90


def test_all_right_of_twelve_is_not_certain() -> None:
    assert mean_of("p", "n", np.ones(12)).low == pytest.approx(0.757, abs=1e-3)  # Wilson's, 12 / (12 + 1.96²)


def test_the_interval_holds_the_true_mean_nineteen_times_of_twenty() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        measure = mean_of("p", "n", 0.6 * rng.random(100))
        held += measure.low <= 0.3 <= measure.high
    assert 0.90 <= held / 200 <= 0.98  # two standard errors of a share of 0.95 over 200 are 0.03


@pytest.mark.parametrize("count", [5, 12])
def test_the_interval_of_a_mean_of_few_holds_it_as_often(count: int) -> None:
    """Plain percentiles hold it 84 and 91 times of 100."""
    rng, held, tries = np.random.default_rng(0), 0, 400
    for _ in range(tries):
        measure = mean_of("p", "n", rng.random(count))
        held += measure.low <= 0.5 <= measure.high
    assert 0.90 * tries <= held <= 0.98 * tries


def test_four_values_have_no_interval() -> None:
    four = mean_of("p", "n", [0.1, 0.2, 0.3, 0.4])
    assert four.value == pytest.approx(0.25)
    assert np.isnan([four.low, four.high]).all()
    apart = difference(four, mean_of("p", "n", [0.2, 0.4, 0.6, 0.8]))
    assert apart is not None
    assert np.isnan([apart.low, apart.high]).all()
    assert not apart.beyond_chance


@pytest.mark.parametrize("freedom", [4, 5.5, 9, 11, 29, 1000])
def test_students_t_is_that_of_scipy(freedom: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert _student_t(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=4e-4)


def test_a_zero_has_no_sign() -> None:
    measure = mean_of("p", "n", [-1e-5, 2e-5, -3e-5, 1e-5, -1e-5, -2e-5])
    assert measure.in_words() == "0.000 (0.000 to 0.000)"


def test_pictures_without_a_value_are_left_out_and_counted() -> None:
    measure = mean_of("p", "n", [1.0, np.nan, 0.0, 1.0])
    assert measure.count == 3
    assert measure.value == pytest.approx(2 / 3)


def test_no_value_at_all_is_no_number() -> None:
    measure = mean_of("p", "n", [np.nan, np.nan])
    assert np.isnan(measure.value)
    assert measure.count == 0


def test_a_difference_of_pairs_is_narrower_than_two_intervals() -> None:
    rng = np.random.default_rng(1)
    first = rng.random(400)
    second = first + 0.01
    ours, theirs = mean_of("p", "n", first), mean_of("p", "n", second)
    paired = difference(ours, theirs)
    assert paired is not None
    assert paired.value == pytest.approx(0.01)
    assert paired.low > 0 > ours.low - theirs.high


def test_four_pictures_of_a_thousand_are_within_chance() -> None:
    first, second = np.zeros(1000), np.zeros(1000)
    second[:4] = 1
    few = difference(mean_of("p", "n", first), mean_of("p", "n", second))
    second[:12] = 1
    more = difference(mean_of("p", "n", first), mean_of("p", "n", second))
    assert few is not None
    assert more is not None
    assert not few.beyond_chance  # a sign test gives p 0.125
    assert more.beyond_chance


@pytest.mark.parametrize(("right", "count"), [(12, 12), (8, 1000), (3, 40)])
def test_a_paired_difference_is_the_same_the_other_way_round(right: int, count: int) -> None:
    some = np.zeros(count)
    some[:right] = 1.0
    first, second = mean_of("p", "n", np.zeros(count)), mean_of("p", "n", some)
    there, back = difference(first, second), difference(second, first)
    assert there is not None
    assert back is not None
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))
    assert there.low < there.value == right / count <= there.high <= 1
    assert there.low > 0 or right < 6


@pytest.mark.parametrize("shares", [(0.9, 0.02, 0.06, 0.02), (0.3, 0.2, 0.3, 0.2), (0.0, 0.5, 0.5, 0.0)])
def test_the_interval_of_a_paired_difference_holds_the_truth(shares: tuple[float, ...]) -> None:
    """Shares of pictures: both right, the first alone, the second alone, neither."""
    rng, held, tries = np.random.default_rng(7), 0, 400
    for _ in range(tries):
        kind = rng.choice(4, 60, p=shares)
        first, second = (mean_of("p", "n", np.isin(kind, kinds).astype(float)) for kinds in ((0, 1), (0, 2)))
        apart = difference(first, second)
        assert apart is not None
        held += apart.low <= shares[2] - shares[1] <= apart.high
    assert 0.92 * tries <= held <= 0.995 * tries


def test_what_is_all_the_same_has_no_interval_by_resampling() -> None:
    constant = mean_of("p", "n", [0.5] * 12)
    assert np.isnan([constant.low, constant.high]).all()
    assert constant.in_words() == "0.500"
    higher = difference(constant, mean_of("p", "n", [0.75] * 12))
    assert higher is not None
    assert np.isnan([higher.low, higher.high]).all()
    nothing = difference(constant, constant)
    assert nothing is not None
    assert (nothing.low, nothing.value, nothing.high) == (0.0, 0.0, 0.0)


def test_what_is_no_mean_has_no_paired_difference() -> None:
    rank = statistic_of("p", "n", 10, lambda counts: float(counts.sum()))
    assert difference(rank, rank) is None


def test_a_statistic_is_of_all_pictures_once() -> None:
    values = np.arange(10.0)
    measure = statistic_of("p", "n", 10, lambda counts: float(counts @ values / counts.sum()))
    assert measure.value == pytest.approx(4.5)
    assert measure.low < 4.5 < measure.high


def test_many_values_are_resampled_in_blocks_to_the_same_effect() -> None:
    values = np.random.default_rng(2).random(40_000)  # more than fit into one draw
    measure = mean_of("p", "n", values)
    half_width = 1.96 * values.std() / 200
    assert measure.high - measure.value == pytest.approx(half_width, rel=0.15)


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(3).random(40)
    measure = statistic_of("p", "n", 40, lambda counts: float(counts @ values / counts.sum()))
    error = values.std(ddof=1) / np.sqrt(40)
    assert measure.high - measure.value == pytest.approx(1.96 * error)


def test_the_interval_of_a_statistic_holds_it() -> None:
    rng = np.random.default_rng(4)
    rows = rng.normal(size=(60, 16))

    def rank(counts: npt.NDArray[np.float64]) -> float:
        shares = np.sqrt(np.linalg.eigvalsh((rows * counts[:, None]).T @ rows))
        shares /= shares.sum()
        return float(np.exp(-(shares * np.log(shares)).sum()))

    measure = statistic_of("p", "n", 60, rank)
    assert measure.low < measure.value < measure.high
