"""Intervals of a mean over images and seeds, from one array of scores; pure numpy and scipy, float64.

Shapes: `S` seeds (runs of one arm that differ in the seed alone), `n` questions in `G` clusters (images).

The design is crossed: every seed answers every question. Two populations stand behind a claim about a component,
the images and the seeds, so the variance has two parts and what both hold is taken out once (Cameron, Gelbach and
Miller 2011, "Robust Inference With Multiway Clustering", two-way clustering):

* `image`: the cluster-robust variance of the mean over questions, after the mean over seeds, with the factor
  G / (G - 1), known as CR1 (Miller, arXiv 2411.00640, clustered standard errors, has the same sum with another
  small-sample term);
* `seed`: s^2 / S of the S seed-level means;
* `overlap`: the seed-by-image noise, which both of them contain, from the residuals of the two-way table.

With two or three seeds `s^2` is often tiny by accident, and the usual Satterthwaite degrees of freedom then trust
it most when it is most wrong. `half_width` combines the parts as Banerjee does (1960, "Approximate confidence
interval for linear functions of means of k populations when the population variances are not equal", Sankhya 22),
each with its own t quantile, which covers at least nominally for any ratio of the true variances.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from chiasm.errors import DataError

CONFIDENCE = 0.95

Floats = NDArray[np.float64]
Verdict = Literal["better", "worse", "undecided"]


@dataclass(frozen=True, slots=True)
class Components:
    """The parts of the variance of one mean, or of a batch of them (arrays of equal shape).

    Args:
        image: variance of the mean because other images could have been drawn; infinite with one image.
        seed: variance because other seeds could have been; 0 with one seed, where it is unknown.
        overlap: the part that both hold; 0 with one seed.
        seeds: S.
        images: G.
    """

    image: Floats
    seed: Floats
    overlap: Floats
    seeds: int
    images: int

    def variance(self) -> Floats:
        """`image + seed - overlap`, never below the larger of the first two."""
        total = self.image + np.maximum(self.seed - self.overlap, 0.0)
        return np.maximum(total, np.maximum(self.image, self.seed))

    def half_width(self, alpha: float) -> Floats:
        """Half of the interval that leaves `alpha` outside, in the units of the values.

        With t_s and t_g the two-sided quantiles for S - 1 and G - 1 degrees of freedom,

            max(t_s^2 seed, t_g^2 overlap) + t_g^2 max(image - overlap, 0)

        is its square. Why it covers: for normal means the coverage is E[F(sum_i w_i t_i^2 u_i)] with F the
        chi-squared distribution, w_i the shares of the true variance and u_i = chi2(df_i) / df_i. F is concave,
        hence this is at least sum_i w_i E[F(t_i^2 u_i)] = 1 - alpha. The first maximum only widens: the seed part
        is never taken to be smaller than the noise that the questions alone put into it.
        """
        if self.images < 2:
            return np.full_like(self.image, np.inf)
        square_g = _quantile(self.images - 1, alpha) ** 2
        seed_part = square_g * self.overlap
        if self.seeds > 1:
            seed_part = np.maximum(seed_part, _quantile(self.seeds - 1, alpha) ** 2 * self.seed)
        return np.sqrt(seed_part + square_g * np.maximum(self.image - self.overlap, 0.0))


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95% interval over images and seeds; scores are in [0, 1], so 0.01 is a percent point.

    Args:
        estimate: the mean over runs and questions.
        low: lower end; -inf where no interval can be formed (a single image).
        high: upper end.
        se: standard error, the root of `Components.variance`.
        p_value: of a mean of 0, by inverting the interval; NaN for an accuracy, where 0 is of no interest.
        seeds: S; with 1 the interval holds for these checkpoints only.
        questions: n, after exclusion.
        images: G.
        cells: how many matched cells of the other factors were averaged.
        excluded: questions left out because some run has no score for them.
        runs_missing: of cells x seeds, those without a run (see `pairing.seed_design`).
        runs_left_out: matched runs that share neither cell nor seed with those used.
    """

    estimate: float
    low: float
    high: float
    se: float
    p_value: float
    seeds: int
    questions: int
    images: int
    cells: int = 1
    excluded: int = 0
    runs_missing: int = 0
    runs_left_out: int = 0

    @property
    def verdict(self) -> Verdict:
        """`undecided` where the interval includes 0."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "undecided"


def variance_components(values: ArrayLike, clusters: ArrayLike, *, seed_factor: float = 1.0) -> Components:
    """Estimates the parts of the variance of the grand mean.

    Args:
        values: `[..., S, n]`, without NaN; leading axes are a batch.
        clusters: `[n]`, equal labels for questions about one image.
        seed_factor: multiplies the seed part, where the S rows are not independent.

    Returns:
        Components with arrays of shape `[...]`.
    """
    x = np.asarray(values, dtype=np.float64)
    seeds, n = x.shape[-2:]
    per_question = x.mean(axis=-2)
    mean = per_question.mean(axis=-1)
    per_image = _cluster_sums(per_question - mean[..., None], clusters)
    images = per_image.shape[-1]
    zero = np.zeros_like(mean)
    if images < 2:
        return Components(np.full_like(mean, np.inf), zero, zero, seeds, images)
    small = images / (images - 1)
    image = small * np.square(per_image).sum(axis=-1) / n**2
    if seeds < 2:
        return Components(image, zero, zero, seeds, images)
    per_seed = x.mean(axis=-1)
    seed = seed_factor * per_seed.var(axis=-1, ddof=1) / seeds
    residual = x - per_question[..., None, :] - per_seed[..., None] + mean[..., None, None]
    sums = _cluster_sums(residual, clusters)
    overlap = small * seeds / (seeds - 1) * np.square(sums).sum(axis=(-2, -1)) / (seeds * n) ** 2
    return Components(image, seed, overlap, seeds, images)


def mean_interval(
    values: ArrayLike, clusters: ArrayLike, *, bounds: tuple[float, float] = (-1.0, 1.0), seed_factor: float = 1.0
) -> Interval:
    """The mean of differences (between two levels, or to chance) with its interval and the p-value of 0.

    The interval is symmetric, cut at `bounds`. Where every value is the same, the variance is 0 and says nothing:
    the exact binomial bound takes its place (of G images none differed, so the share of images that do is below
    1 - (alpha / 2)^(1 / G)).

    Args:
        values: `[S, n]`, without NaN.
        clusters: `[n]`.
        bounds: the least and the greatest value that a question can have.
        seed_factor: see `variance_components`.

    Raises:
        DataError: there is no question.
    """
    x = _checked(values, clusters)
    parts = variance_components(x, clusters, seed_factor=seed_factor)
    estimate = float(x.mean())
    if float(np.ptp(x)) == 0.0:
        low, high, p_value = _constant(estimate, parts.images, bounds)
    else:
        half = float(parts.half_width(1 - CONFIDENCE))
        low, high = estimate - half, estimate + half
        p_value = _p_value(parts, estimate)
    if parts.images > 1:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    se = math.sqrt(float(parts.variance()))
    return Interval(estimate, low, high, se, p_value, parts.seeds, x.shape[1], parts.images)


def accuracy_interval(scores: ArrayLike, clusters: ArrayLike, *, seed_factor: float = 1.0) -> Interval:
    """The mean of scores in [0, 1] with an interval that stays in [0, 1].

    Wilson's form (1927), with the variance above in place of p (1 - p) / n: the ends are the means m for which
    (p - m)^2 = h^2 m (1 - m) / (p (1 - p)), h the half width of the symmetric interval. Far from 0 and 1 it is the
    symmetric interval; near them it does not collapse. Where all scores are equal it is the exact binomial one
    of G images (Clopper and Pearson 1934).

    Args:
        scores: `[S, n]`, without NaN.
        clusters: `[n]`.
        seed_factor: see `variance_components`.

    Raises:
        DataError: there is no question.
    """
    x = _checked(scores, clusters)
    parts = variance_components(x, clusters, seed_factor=seed_factor)
    p = min(max(float(x.mean()), 0.0), 1.0)
    if p in (0.0, 1.0) or float(np.ptp(x)) == 0.0:
        low, high, _ = _constant(p, parts.images, (0.0, 1.0))
    elif parts.images < 2:
        low, high = -math.inf, math.inf
    else:
        k = float(parts.half_width(1 - CONFIDENCE)) ** 2 / (p * (1 - p))
        middle = (p + k / 2) / (1 + k)
        half = math.sqrt(k * p * (1 - p) + k * k / 4) / (1 + k)
        low, high = max(middle - half, 0.0), min(middle + half, 1.0)
    se = math.sqrt(float(parts.variance()))
    return Interval(p, low, high, se, math.nan, parts.seeds, x.shape[1], parts.images)


def holm(p_values: ArrayLike) -> Floats:
    """Adjusts p-values for their number (Holm 1979): a claim stands at level a where its adjusted p is at most a.

    Args:
        p_values: `[m]`, the whole family.

    Returns:
        `[m]`, in the order given.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted


def _quantile(df: int, alpha: float) -> float:
    return -float(special.stdtrit(df, alpha / 2))


def _cluster_sums(values: Floats, clusters: ArrayLike) -> Floats:
    """`[..., n]` to `[..., G]`."""
    labels = np.asarray(clusters)
    order = np.argsort(labels, kind="stable")
    ranked = labels[order]
    starts = np.concatenate([[0], np.flatnonzero(ranked[1:] != ranked[:-1]) + 1])
    return np.add.reduceat(values[..., order], starts, axis=-1)


def _checked(values: ArrayLike, clusters: ArrayLike) -> Floats:
    x = np.asarray(values, dtype=np.float64)
    assert x.shape[1:] == np.asarray(clusters).shape, "values are [S, n] and clusters [n]"
    if x.size == 0:
        raise DataError("no question has a score in every compared run, so there is no mean to form")
    assert not np.isnan(x).any(), "questions without a score are to be excluded before"
    return x


def _p_value(parts: Components, estimate: float) -> float:
    """The largest alpha whose interval includes 0, by bisection of log alpha; 1e-15 stands for less."""
    if estimate == 0.0 or parts.images < 2:
        return 1.0
    low, high = math.log(1e-15), 0.0
    for _ in range(50):
        middle = (low + high) / 2
        if float(parts.half_width(math.exp(middle))) >= abs(estimate):
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def _constant(value: float, images: int, bounds: tuple[float, float]) -> tuple[float, float, float]:
    """Interval and p-value of 0 where all values are equal: the exact binomial bound over `images`."""
    if images < 2:
        return -math.inf, math.inf, 1.0
    share = 1 - ((1 - CONFIDENCE) / 2) ** (1 / images)
    low, high = value - share * (value - bounds[0]), value + share * (bounds[1] - value)
    if value == 0.0:
        return low, high, 1.0
    reach = value / (value - bounds[0]) if value > 0 else value / (value - bounds[1])
    return low, high, min(1.0, 2 * (1 - reach) ** images)
