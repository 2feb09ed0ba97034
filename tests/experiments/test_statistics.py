"""The intervals against independent computations: brute-force loops, sandwich algebra, scipy, and simulated studies."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import optimize, stats

from chiasm.errors import DataError
from chiasm_experiments.report.pairing import Runs, cell_interval, paired_difference, seed_design
from chiasm_experiments.report.statistics import (
    Components,
    accuracy_interval,
    holm,
    mean_interval,
    variance_components,
)

Floats = NDArray[np.float64]


def make_runs(scores: Floats, keys: list[tuple[str, int]], clusters: NDArray[np.int64], name: str = "a") -> Runs:
    return Runs(tuple(keys), np.arange(scores.shape[1]), clusters, scores, name)


@pytest.fixture
def clusters() -> NDArray[np.int64]:
    """Unequal images, in no order."""
    rng = np.random.default_rng(3)
    return rng.permutation(np.repeat(np.arange(25), rng.integers(1, 6, 25)))


# --- one seed: the clustered standard error ----------------------------------------------------------------------


def test_image_part_is_the_double_loop(clusters: NDArray[np.int64]) -> None:
    x = np.random.default_rng(0).integers(0, 2, clusters.size).astype(np.float64)
    n, mean, images = x.size, x.mean(), len(set(clusters))
    cross = same = 0.0
    for i in range(n):
        for j in range(n):
            if clusters[i] == clusters[j]:
                same += (x[i] - mean) * (x[j] - mean)
                cross += (x[i] - mean) * (x[j] - mean) if i != j else 0.0
    parts = variance_components(x[None], clusters)
    assert float(parts.image) == pytest.approx(images / (images - 1) * same / n**2, rel=1e-12)
    # Miller's form (arXiv 2411.00640) has s^2 / n for the diagonal instead of the factor G / (G - 1).
    miller = x.var(ddof=1) / n + cross / n**2
    assert float(parts.image) * (images - 1) / images + x.var(ddof=1) / n**2 == pytest.approx(miller, rel=1e-12)


def test_image_part_is_the_sandwich_of_a_regression_on_a_constant(clusters: NDArray[np.int64]) -> None:
    """What statsmodels gives for OLS(x, 1) with cov_type="cluster", except its factor (n - 1) / (n - k) = 1 here."""
    x = np.random.default_rng(1).normal(size=clusters.size)
    ones = np.ones((x.size, 1))
    bread = np.linalg.inv(ones.T @ ones)
    residual = x - ones[:, 0] * (bread @ ones.T @ x)[0]
    meat = np.zeros((1, 1))
    for image in set(clusters):
        inside = clusters == image
        score = ones[inside].T @ residual[inside, None]
        meat += score @ score.T
    images = len(set(clusters))
    expected = images / (images - 1) * (bread @ meat @ bread)[0, 0]
    assert float(variance_components(x[None], clusters).image) == pytest.approx(expected, rel=1e-12)


def test_without_clusters_and_seeds_it_is_the_t_test() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(0.3, 0.2, 40), rng.normal(0.2, 0.2, 40)
    ours = mean_interval((a - b)[None], np.arange(40))
    theirs = stats.ttest_rel(a, b)
    assert ours.p_value == pytest.approx(theirs.pvalue, rel=1e-6)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)), rel=1e-9)
    assert ours.se == pytest.approx(stats.sem(a - b), rel=1e-12)


# --- several seeds -----------------------------------------------------------------------------------------------


def test_parts_are_the_mean_squares_of_the_two_way_table() -> None:
    """With one question for an image, var(mean) = (MS_seed + MS_image - MS_rest) / (S G), each from its definition."""
    x = np.random.default_rng(4).normal(size=(4, 30))
    seeds, images = x.shape
    ms_seed = images * sum((x[s].mean() - x.mean()) ** 2 for s in range(seeds)) / (seeds - 1)
    ms_image = seeds * sum((x[:, q].mean() - x.mean()) ** 2 for q in range(images)) / (images - 1)
    rest = sum(
        (x[s, q] - x[s].mean() - x[:, q].mean() + x.mean()) ** 2
        for s, q in itertools.product(range(seeds), range(images))
    )
    ms_rest = rest / ((seeds - 1) * (images - 1))
    parts = variance_components(x, np.arange(images))
    assert float(parts.seed) == pytest.approx(ms_seed / (seeds * images), rel=1e-12)
    assert float(parts.image) == pytest.approx(ms_image / (seeds * images), rel=1e-12)
    assert float(parts.overlap) == pytest.approx(ms_rest / (seeds * images), rel=1e-12)


def test_half_width_written_out() -> None:
    parts = Components(np.array(9e-4), np.array(4e-4), np.array(1e-4), seeds=3, images=50)
    t_seed, t_image = stats.t.ppf(0.975, 2), stats.t.ppf(0.975, 49)
    assert float(parts.half_width(0.05)) == pytest.approx(math.sqrt(t_seed**2 * 4e-4 + t_image**2 * 8e-4), rel=1e-9)
    assert float(parts.variance()) == pytest.approx(12e-4)


@pytest.mark.parametrize("seed_part", [0.0, 1e-9, 1e-5])
def test_an_accidental_agreement_of_two_seeds_does_not_narrow(seed_part: float) -> None:
    parts = Components(np.array(4e-4), np.array(seed_part), np.array(3e-4), seeds=2, images=100)
    alone = stats.t.ppf(0.975, 99) * math.sqrt(4e-4)
    assert float(parts.half_width(0.05)) >= alone * (1 - 1e-9)
    assert float(parts.variance()) >= 4e-4


def test_seeds_alone_are_a_t_test_over_seeds() -> None:
    """Where all images agree, the seeds' means are all there is."""
    levels = np.array([0.10, 0.13, 0.19])
    ours = mean_interval(np.repeat(levels[:, None], 20, axis=1), np.arange(20))
    theirs = stats.ttest_1samp(levels, 0)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)), rel=1e-9)
    assert ours.p_value == pytest.approx(theirs.pvalue, rel=1e-6)


def test_p_value_inverts_the_interval(clusters: NDArray[np.int64]) -> None:
    values = np.random.default_rng(5).normal(0.05, 0.5, (3, clusters.size))
    interval = mean_interval(values, clusters)
    parts = variance_components(values, clusters)
    at_p = float(parts.half_width(interval.p_value))
    assert at_p == pytest.approx(abs(interval.estimate), rel=1e-6)
    root = optimize.brentq(lambda a: float(parts.half_width(a)) - abs(interval.estimate), 1e-9, 1.0)
    assert interval.p_value == pytest.approx(root, rel=1e-5)


# --- edges -------------------------------------------------------------------------------------------------------


def test_constant_values_have_the_exact_binomial_interval() -> None:
    exact = stats.binomtest(30, 30).proportion_ci(0.95)
    for seeds in (1, 3):
        ours = accuracy_interval(np.ones((seeds, 30)), np.arange(30))
        assert (ours.low, ours.high) == pytest.approx((exact.low, exact.high), abs=1e-12)
    none = mean_interval(np.zeros((2, 30)), np.arange(30))
    assert (none.verdict, none.p_value) == ("undecided", 1.0)
    assert none.high == pytest.approx(1 - exact.low, abs=1e-12)
    always = mean_interval(np.ones((1, 10)), np.arange(10))
    assert always.p_value == pytest.approx(stats.binomtest(10, 10).pvalue)
    assert always.verdict == "better"


def test_accuracy_is_wilsons_interval() -> None:
    scores = np.array([[1.0] * 57 + [0.0] * 3])
    ours = accuracy_interval(scores, np.arange(60))
    p, n, t = 57 / 60, 59, stats.t.ppf(0.975, 59)  # n - 1, for the sample variance's factor

    def off(mean: float) -> float:
        return float((p - mean) ** 2 - t**2 * mean * (1 - mean) / n)

    assert ours.low == pytest.approx(optimize.brentq(off, 0.5, p), abs=1e-9)
    assert ours.high == pytest.approx(optimize.brentq(off, p, 1.0), abs=1e-9)
    assert ours.high < 1
    wilson = stats.binomtest(57, 60).proportion_ci(0.95, method="wilson")
    assert (ours.low, ours.high) == pytest.approx((wilson.low, wilson.high), abs=0.005)


def test_one_image_has_no_interval() -> None:
    for interval in (mean_interval([[0.0, 1.0]], [0, 0]), accuracy_interval([[0.0, 1.0]], [0, 0])):
        assert (interval.low, interval.high) == (-math.inf, math.inf)
        assert interval.verdict == "undecided"


def test_holm_is_the_textbook_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]).size == 0


# --- pairing -----------------------------------------------------------------------------------------------------


def crossed(rng: np.random.Generator, clusters: NDArray[np.int64], name: str = "a", p: float = 0.5) -> Runs:
    keys = [(cell, seed) for cell in ("x", "y") for seed in (0, 1, 2)]
    return make_runs((rng.uniform(size=(6, clusters.size)) < p).astype(np.float64), keys, clusters, name)


def test_difference_is_antisymmetric(clusters: NDArray[np.int64]) -> None:
    rng = np.random.default_rng(6)
    a, b = crossed(rng, clusters, p=0.7), crossed(rng, clusters)
    ab, ba = paired_difference(a, b), paired_difference(b, a)
    assert (ab.estimate, ab.low, ab.high) == pytest.approx((-ba.estimate, -ba.high, -ba.low))
    assert (ab.se, ab.p_value) == pytest.approx((ba.se, ba.p_value))
    assert {ab.verdict, ba.verdict} == {"better", "worse"}
    assert (ab.cells, ab.seeds, ab.questions, ab.images) == (2, 3, clusters.size, 25)


def test_difference_pairs_by_cell_and_seed_whatever_the_order(clusters: NDArray[np.int64]) -> None:
    rng = np.random.default_rng(7)
    a, b = crossed(rng, clusters, p=0.7), crossed(rng, clusters)
    order = [4, 2, 0, 5, 3, 1]
    shuffled = make_runs(b.scores[order], [b.keys[i] for i in order], clusters, "b")
    assert paired_difference(a, shuffled) == paired_difference(a, b)
    by_seed = np.stack([(a.scores[[s, s + 3]] - b.scores[[s, s + 3]]).mean(axis=0) for s in range(3)])
    assert paired_difference(a, b).low == pytest.approx(mean_interval(by_seed, clusters).low)


def test_pairing_narrows_what_the_questions_share(clusters: NDArray[np.int64]) -> None:
    rng = np.random.default_rng(8)
    a = crossed(rng, clusters)
    flips = rng.uniform(size=a.scores.shape) < 0.05
    b = make_runs(np.where(flips, 1 - a.scores, a.scores), list(a.keys), clusters, "b")
    assert paired_difference(a, b).se < 0.5 * cell_interval(a).se


def test_unequal_questions_are_named(clusters: NDArray[np.int64]) -> None:
    a = crossed(np.random.default_rng(9), clusters)
    questions = a.questions + 1
    b = Runs(a.keys, questions, clusters, a.scores, "b")
    with pytest.raises(DataError, match=rf"1 \(0\) only in a, 1 \({clusters.size}\) only in b"):
        paired_difference(a, b)


def test_not_scored_is_excluded_on_both_sides(clusters: NDArray[np.int64]) -> None:
    rng = np.random.default_rng(10)
    a, b = crossed(rng, clusters, p=0.7), crossed(rng, clusters)
    a.scores[2, 5] = b.scores[4, 7] = np.nan
    interval = paired_difference(a, b)
    keep = np.ones(clusters.size, dtype=bool)
    keep[[5, 7]] = False
    assert (interval.excluded, interval.questions) == (2, clusters.size - 2)
    assert interval.estimate == pytest.approx((a.scores[:, keep] - b.scores[:, keep]).mean())
    a.scores[0] = np.nan
    with pytest.raises(DataError, match=r"none of .* questions has a score in every run"):
        paired_difference(a, b)


def test_nothing_in_common_is_an_error(clusters: NDArray[np.int64]) -> None:
    a = crossed(np.random.default_rng(11), clusters)
    b = make_runs(a.scores, [("z", seed) for seed in range(6)], clusters, "b")
    with pytest.raises(DataError, match="a and b have no cell and seed in common"):
        paired_difference(a, b)


# --- missing runs ------------------------------------------------------------------------------------------------


def test_a_missing_run_is_filled_by_the_additive_model() -> None:
    """Exact where the model holds: the seed that lacks the hard cell does not look better."""
    cell, seed = np.array([0.1, 0.5, 0.9]), np.array([-0.05, 0.0, 0.05])
    keys = [(f"c{i}", j) for i, j in itertools.product(range(3), range(3)) if (i, j) not in {(0, 0), (1, 2)}]
    design = seed_design(keys)
    values = np.array([cell[int(name[1])] + seed[j] for name, j in keys])
    assert design.weights @ values == pytest.approx(0.5 + seed)
    assert design.weights.sum(axis=1) == pytest.approx(1.0)
    assert (design.cells, design.missing, design.left_out) == (3, 2, 0)


def test_a_whole_design_is_the_plain_mean() -> None:
    keys = [(cell, seed) for cell in "ab" for seed in (3, 1)]
    design = seed_design(keys)
    assert design.weights.tolist() == [[0, 0.5, 0, 0.5], [0.5, 0, 0.5, 0]]
    assert design.factor == 1.0


def test_unconnected_runs_are_left_out_and_counted() -> None:
    design = seed_design([("a", 0), ("b", 0), ("b", 1), ("c", 7), ("d", 7)])
    assert design.rows == (0, 1, 2)
    assert (design.cells, design.missing, design.left_out) == (2, 1, 2)


@pytest.mark.parametrize(("common", "own"), [(0.0, 1.0), (1.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("lost", [{(0, 0)}, {(0, 0), (1, 2)}, {(0, 0), (0, 1)}, {(1, 2), (2, 2)}])
def test_missing_runs_keep_the_coverage(lost: set[tuple[int, int]], common: float, own: float) -> None:
    rng = np.random.default_rng(12)
    pairs = [pair for pair in itertools.product(range(3), range(3)) if pair not in lost]
    design = seed_design([(str(cell), seed) for cell, seed in pairs])
    cell, seed = np.array([0.0, 3.0, -5.0]), common * rng.normal(size=(4000, 3))
    runs = np.stack([cell[c] + seed[:, s] for c, s in pairs], axis=1) + own * rng.normal(size=(4000, len(pairs)))
    per_seed = runs @ design.weights.T
    half = stats.t.ppf(0.975, 2) * np.sqrt(design.factor * per_seed.var(axis=1, ddof=1) / 3)
    assert (np.abs(per_seed.mean(axis=1) - cell.mean()) <= half).mean() >= 0.94


# --- coverage ----------------------------------------------------------------------------------------------------

IMAGES, PER_IMAGE = 60, 2


def simulate(
    rng: np.random.Generator, draws: int, seeds: int, seed_sd: float, noise: float
) -> tuple[Floats, NDArray[np.int64], float]:
    """Differences `[draws, S, n]` of two arms' binary scores, and their true mean over all images and seeds.

    Latent normal effects: of the image and question (common to both arms, and of each arm), of the seed, and of the
    seed on the question. A score is 1 where their sum is positive, so its true mean is a normal probability.
    """

    def by_image(sd: float) -> Floats:
        return sd * np.repeat(rng.normal(size=(draws, 1, IMAGES)), PER_IMAGE, axis=2)

    n = IMAGES * PER_IMAGE
    common = by_image(0.7) + 0.7 * rng.normal(size=(draws, 1, n))
    spread = math.sqrt(2 * 0.7**2 + 0.3**2 + 0.5**2 + seed_sd**2 + noise**2)
    arms = []
    for level in (0.3, 0.0):
        own = by_image(0.3) + 0.5 * rng.normal(size=(draws, 1, n)) + seed_sd * rng.normal(size=(draws, seeds, 1))
        arms.append(level + common + own + noise * rng.normal(size=(draws, seeds, n)) > 0)
    truth = stats.norm.cdf(0.3 / spread) - 0.5
    return arms[0].astype(np.float64) - arms[1], np.repeat(np.arange(IMAGES), PER_IMAGE), float(truth)


# The width is that of the mean interval in units of 2 x 1.96 true standard deviations: what honesty costs.
@pytest.mark.parametrize(("seeds", "widest"), [(2, 5.5), (3, 2.1), (5, 1.4)])
@pytest.mark.parametrize(("seed_sd", "noise"), [(0.0, 0.3), (0.08, 1.0), (0.25, 0.3)])
def test_coverage_over_images_and_seeds(seeds: int, widest: float, seed_sd: float, noise: float) -> None:
    values, clusters, truth = simulate(np.random.default_rng([seeds, 1]), 1200, seeds, seed_sd, noise)
    means = values.mean(axis=(1, 2))
    half = variance_components(values, clusters).half_width(0.05)
    assert (np.abs(means - truth) <= half).mean() >= 0.93
    assert half.mean() / (1.96 * means.std()) <= widest


def test_satterthwaite_would_not_cover_with_two_seeds() -> None:
    """Why `half_width` is not the usual approximation."""
    values, clusters, truth = simulate(np.random.default_rng(13), 1200, 2, 0.25, 0.3)
    parts = variance_components(values, clusters)
    df = parts.variance() ** 2 / (parts.seed**2 / 1 + parts.image**2 / (IMAGES - 1))
    half = stats.t.isf(0.025, df) * np.sqrt(parts.variance())
    assert (np.abs(values.mean(axis=(1, 2)) - truth) <= half).mean() < 0.93


@pytest.mark.parametrize("p", [0.5, 0.97])
def test_coverage_of_accuracies_near_one(p: float) -> None:
    rng = np.random.default_rng(14)
    level = stats.norm.ppf(p) * math.sqrt(1.45)
    hits = []
    for _ in range(600):
        latent = level + 0.6 * np.repeat(rng.normal(size=(1, 40)), 2, axis=1) + 0.3 * rng.normal(size=(3, 1))
        scores = (latent + rng.normal(size=(3, 80)) > 0).astype(np.float64)
        interval = accuracy_interval(scores, np.repeat(np.arange(40), 2))
        hits.append(interval.low <= p <= interval.high)
    assert np.mean(hits) >= 0.93
