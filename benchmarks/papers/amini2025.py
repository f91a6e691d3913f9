"""Amini, Vieira and Cotterell (2025): the variance of estimators of a KL, and what it does to training.

For draws x of q, with l_t = log q_t - log p0_t (theory.md 2.6),

    k1          sum_t l_t                            k3          exp(-k1) - 1 + k1
    k2          1/2 (sum_t l_t)^2                    k3 by token sum_t (exp(-l_t) - 1 + l_t)
    control     k1 + c (exp(-k1) - 1), c optimal     RB          sum_t KL(q_t || p0_t), over the vocabulary

Where all completions are enumerated their means and variances are exact, and draws are judged against them by
z-scores. On GOLD-D (theory.md 8.3), whose posterior is exact at any length, draws show what length does. Schulman's
(2020) figures for two Gaussians are closed forms. Last, `bk.SVI` trains by the Rao-Blackwellised gradient and by
leave-one-out, and the share of each among the runs that no other run beats in reward and KL is counted.
"""

from __future__ import annotations

import numpy as np

import bayes_klrl as bk
from bayes_klrl.inference.exact.messages import backward_messages
from bayes_klrl.inference.exact.oracles import Enumerated
from bayes_klrl.models.automata.automaton import Automaton
from bayes_klrl.models.automata.reward import AutomatonReward
from bayes_klrl.models.prefix_policy import PrefixTree
from bayes_klrl.problems import gold_dense, gpt2_task
from bayes_klrl.typing import FloatArray, LanguageModel
from benchmarks.papers.go2023 import Path
from benchmarks.papers.record import Cell, Claim, Paper, Table, interval
from benchmarks.papers.truth import EnumeratedTruth, kl

__all__ = ["SCHULMAN", "estimates", "gaussian_row", "k3_sd_of_dense", "moments", "pareto_share", "per_token", "study"]

ESTIMATORS = ("k1", "k2", "k3", "k3 by token", "control", "RB")
SCHULMAN = {0.1: (20.0, 1.42, 1.42, 0.002), 1.0: (2.0, 1.73, 1.7, 0.25)}
"""sd / KL of k1, k2, k3 and the relative bias of k2 in Schulman (2020), by the distance of two unit Gaussians."""


def study(*, num_seeds: int = 5, tiny: bool = False) -> Paper:
    """Return the study."""
    enumerated, ratios, worst = _enumerated(num_seeds, 100 if tiny else 2000, tiny=tiny)
    lengths = _lengths((5,) if tiny else (5, 10, 20, 40), 200 if tiny else 2000, num_seeds)
    gaussians, as_published = _gaussians()
    training, shares = _training(num_seeds, (3, 32) if tiny else (60, 256), tiny=tiny)
    return Paper(
        "amini2025",
        "Amini, Vieira and Cotterell 2025, Better estimation of the KL divergence between language models",
        "Tiny GPT-2 posteriors (exact by enumeration), GOLD-D (exact by messages) and two Gaussians (closed form).",
        (
            Claim(
                "the Rao-Blackwellised estimate is unbiased and has at most the variance of k1",
                "reproduced" if min(ratios) >= 1 and worst < 4 else "not reproduced",
                f"Var(k1) / Var(RB) is {min(ratios):.1f} to {max(ratios):.1f} here, exactly; the largest z-score of a mean of "
                f"draws against the exact mean is {worst:.1f}",
            ),
            Claim(
                "Schulman's figures (sd / KL of k1, k2, k3; the bias of k2)",
                "reproduced" if as_published else "not reproduced",
                "closed forms for two Gaussians, to the digits he prints",
            ),
            _about_training(shares),
        ),
        (enumerated, lengths, gaussians, training),
        num_seeds,
    )


def per_token(tree: PrefixTree, log_q: FloatArray, log_p: FloatArray) -> tuple[FloatArray, ...]:
    """Return l_t, shape (M, T), and KL(q_t || p_t) at the prefix before each token, both 0 past the length."""
    q, p = tree.conditionals(log_q[None])[0], tree.conditionals(log_p[None])[0]
    full = (np.exp(q) * (q - p)).sum(axis=1)
    ratio = np.where(tree.mask, (q - p)[tree.states, tree.tokens], 0.0)
    return ratio, np.where(tree.mask, full[tree.states], 0.0)


def estimates(ratio: FloatArray, full: FloatArray) -> dict[str, FloatArray]:
    """Return each estimate of KL(q || p) for every completion, (M,) each, from l_t and KL_t of shape (M, T)."""
    k1 = ratio.sum(axis=1)
    return {
        "k1": k1,
        "k2": k1**2 / 2,
        "k3": np.expm1(-k1) + k1,
        "k3 by token": (np.expm1(-ratio) + ratio).sum(axis=1),
        "RB": full.sum(axis=1),
    }


def with_control(found: dict[str, FloatArray], weights: FloatArray) -> dict[str, FloatArray]:
    """Return the estimates with k1 + c (exp(-k1) - 1) added, c of the least variance under the weights (M,) of completions."""
    control = np.expm1(-found["k1"])  # of mean 0 under q
    centred = found["k1"] - weights @ found["k1"]
    c = -(weights @ (centred * control)) / max(float(weights @ control**2), 1e-300)
    return {**found, "control": found["k1"] + c * control}


def moments(values: FloatArray, weights: FloatArray) -> tuple[float, float]:
    """Return the mean and the standard deviation under weights that sum to 1."""
    mean = float(weights @ values)
    return mean, float(np.sqrt(weights @ (values - mean) ** 2))


def _enumerated(num_seeds: int, num_draws: int, *, tiny: bool) -> tuple[Table, list[float], float]:
    """Return exact means and sds by policy, the ratios Var(k1) / Var(RB), and the largest z-score of draws."""
    rows: list[tuple[Cell, ...]] = []
    ratios, worst = [], 0.0
    for name in ("gpt2-8x4",) if tiny else ("gpt2-8x4", "gpt2-7x5", "gpt2-8x4-sharp"):
        posterior = gpt2_task(name)
        problem, truth = Enumerated.of(posterior), EnumeratedTruth.of(posterior)
        guide = bk.SVI(2 if tiny else 15, 256).fit(posterior, seed=0).guide
        for policy, log_q in (("posterior", truth.log_posterior), ("guide, 15 steps", truth.log_probs(guide))):
            weights = np.exp(log_q) / np.exp(log_q).sum()
            found = with_control(estimates(*per_token(problem.tree, log_q, truth.log_prior)), weights)
            exact = {each: moments(found[each], weights) for each in ESTIMATORS}
            ratios.append((exact["k1"][1] / exact["RB"][1]) ** 2)
            worst = max(worst, _largest_z(found, exact, weights, num_seeds, num_draws))
            cells = (f"{exact[each][0]:.3f} ({exact[each][1]:.3f})" for each in ESTIMATORS)
            rows.append((name, policy, round(kl(log_q, truth.log_prior), 3), *cells, round(ratios[-1], 1)))
    caption = "KL(q || p0) in nats: the exact mean (and sd) of each estimate for one draw"
    return Table(caption, ("task", "q", "KL", *ESTIMATORS, "Var k1 / Var RB"), tuple(rows)), ratios, worst


def _largest_z(
    found: dict[str, FloatArray],
    exact: dict[str, tuple[float, float]],
    weights: FloatArray,
    num_seeds: int,
    num_draws: int,
) -> float:
    """Return the largest |z| of the means of draws against the exact means, over seeds and estimators."""
    largest = 0.0
    for seed in range(num_seeds):
        drawn = np.random.default_rng(seed).choice(len(weights), size=num_draws, p=weights)
        for each, (mean, sd) in exact.items():
            largest = max(largest, abs(float(found[each][drawn].mean()) - mean) / (sd / np.sqrt(num_draws)))
    return largest


def _lengths(lengths: tuple[int, ...], num_draws: int, num_seeds: int) -> Table:
    """Return sd / KL of each estimate on GOLD-D by the number of tokens, from draws of its exact posterior."""
    shown = ("k1", "k3", "k3 by token", "RB")
    rows = []
    for num_tokens in lengths:
        posterior = gold_dense(max_new_tokens=num_tokens)
        messages = backward_messages(posterior)
        exact = float(messages.moments().kl[0])
        k3 = k3_sd_of_dense(num_tokens) / exact
        spread: dict[str, list[float]] = {each: [] for each in shown}
        for seed in range(num_seeds):
            found = estimates(*_drawn_per_token(messages.policy(), posterior, messages.draw(num_draws, seed)))
            for each in shown:
                spread[each].append(float(found[each].std(ddof=1)) / exact)
        rows.append((num_tokens, round(exact, 3), *(interval(spread[each]) for each in shown), float(f"{k3:.3g}")))
    caption = f"GOLD-D: sd of one draw / KL, from {num_draws} draws of the exact posterior; last column exact"
    return Table(caption, ("tokens", "KL(p* || p0)", *shown, "k3, exactly"), tuple(rows))


def k3_sd_of_dense(num_tokens: int, alpha: float = 0.5) -> float:
    """Return the exact standard deviation of k3 for one draw of GOLD-D's posterior, by messages.

    With k1 = b r - log Z(b):  Var exp(-k1) = Z(b) Z(-b) - 1, where Z(-b) is the evidence of the reward -r,
    Var k1 = b^2 Var_p*[r], and Cov(exp(-k1), k1) = -KL(p0 || p*) - KL(p* || p0).
    """
    forward = gold_dense(alpha, num_tokens)
    negated = AutomatonReward(
        Automaton(np.zeros((1, 4), dtype=np.int64)), token_rewards=[0.0, 1.0, -1.0, 0.0], alpha=alpha
    )
    backward = bk.Posterior(forward.prior, negated, max_new_tokens=num_tokens)
    solved, log_evidence = backward_messages(forward), backward_messages(backward).log_evidence[0]
    moments = solved.moments()
    of_ratio = np.expm1(float(solved.log_evidence[0] + log_evidence))
    covariance = -float(moments.kl_from_prior[0] + moments.kl[0])
    return float(np.sqrt(of_ratio + float(moments.variance[0]) / alpha**2 + 2 * covariance))


def _drawn_per_token(
    policy: LanguageModel, posterior: bk.Posterior, drawn: bk.Sequences
) -> tuple[FloatArray, FloatArray]:
    """Return l_t and KL_t of draws by decoding both models over them, shape (N, T) each."""
    tokens, mask = drawn.tokens[0], drawn.mask[0]
    models = (policy, posterior.prior)
    states = [lm.select(lm.prefill(posterior.prompt_ids), np.zeros(len(tokens), dtype=np.int64)) for lm in models]
    ratio, full = np.zeros(tokens.shape), np.zeros(tokens.shape)
    for t in range(tokens.shape[1]):
        q, p = (np.asarray(lm.next_log_probs(state)) for lm, state in zip(models, states, strict=True))
        with np.errstate(invalid="ignore"):
            terms = np.where(np.exp(q) > 0, np.exp(q) * (q - p), 0.0)
        full[:, t] = np.where(mask[:, t], terms.sum(axis=1), 0.0)
        ratio[:, t] = np.where(mask[:, t], np.take_along_axis(q - p, tokens[:, t, None], axis=1)[:, 0], 0.0)
        states = [lm.append(state, tokens[:, t]) for lm, state in zip(models, states, strict=True)]
    return ratio, full


def gaussian_row(mu: float) -> tuple[float, float, float, float]:
    """Return sd / KL of k1, k2, k3 and the relative bias of k2 for q = Normal(0, 1), p = Normal(mu, 1), KL = mu^2 / 2.

    With k1 = mu^2 / 2 - mu x:  Var k1 = mu^2,  E k2 = mu^2 / 2 + mu^4 / 8,  Var k2 = mu^4 / 2 + mu^6 / 4,
    Var k3 = exp(mu^2) - 1 - mu^2.

    Examples
    --------
    >>> [round(value, 3) for value in gaussian_row(1.0)]
    [2.0, 1.732, 1.695, 0.25]
    """
    true = mu**2 / 2
    k2, k3 = np.sqrt(mu**4 / 2 + mu**6 / 4), np.sqrt(np.expm1(mu**2) - mu**2)
    return mu / true, float(k2) / true, float(k3) / true, mu**2 / 4


def _gaussians() -> tuple[Table, bool]:
    """Return Schulman's table, and whether each figure is his to the digits he prints."""
    rows: list[tuple[Cell, ...]] = []
    agree = True
    for mu, published in SCHULMAN.items():
        ours = gaussian_row(mu)
        agree &= all(abs(a - b) <= unit for a, b, unit in zip(ours, published, (0.5, 0.006, 0.03, 0.001), strict=True))
        cells = (f"{a:.4g} ({b:g})" for a, b in zip(ours, published, strict=True))
        rows.append((f"KL = {mu**2 / 2:g}", *cells))
    columns = ("", "sd / KL of k1", "k2", "k3", "relative bias of k2")
    return Table("Two Gaussians, closed forms (and Schulman's figures)", columns, tuple(rows)), agree


_ESTIMATORS_OF_GRADIENTS = {"RB": "rao_blackwell", "leave-one-out": "leave_one_out"}


def _training(num_seeds: int, size: tuple[int, int], *, tiny: bool) -> tuple[Table, dict[int, float]]:
    """Return rewards and KLs of both gradients along the training, and RB's share of the undominated runs by step."""
    base = gpt2_task("gpt2-8x4-sharp")
    points: dict[str, list[FloatArray]] = {label: [] for label in _ESTIMATORS_OF_GRADIENTS}
    every = max(1, size[0] // 3)
    gaps: dict[str, list[FloatArray]] = {label: [] for label in _ESTIMATORS_OF_GRADIENTS}
    for factor in (1.0,) if tiny else (0.5, 1.0, 2.0):
        truth = EnumeratedTruth.of(base.at_alpha(factor * base.alpha))
        for label, estimator in _ESTIMATORS_OF_GRADIENTS.items():
            runs = [_points(truth, size, every, estimator, seed) for seed in range(num_seeds)]
            points[label] += runs
            gaps[label].append(np.stack(runs))
    steps = points["RB"][0][:, 0].astype(int)
    shares = {int(step): pareto_share(points, i) for i, step in enumerate(steps)}
    rows = []
    for i, step in enumerate(steps):
        pooled = {label: np.concatenate(of)[:, i] for label, of in gaps.items()}
        to_posterior = (interval(of[:, 5]) for of in pooled.values())
        rows.append(
            (int(step), *to_posterior, *(interval(of[:, 3]) for of in pooled.values()), round(shares[int(step)], 2))
        )
    names = [f"{what}, {label}" for what in ("KL(q || p*)", "gap") for label in _ESTIMATORS_OF_GRADIENTS]
    count = len(points["RB"])
    caption = f"Training on gpt2-8x4-sharp, {count} runs each (three alphas): the gradients compared"
    return Table(caption, ("step", *names, "RB's share of undominated runs"), tuple(rows)), shares


def _points(truth: EnumeratedTruth, size: tuple[int, int], every: int, estimator: str, seed: int) -> FloatArray:
    """Return what one training passes through; see `go2023.Path`."""
    path = Path(truth, every)
    bk.SVI(*size, estimator=estimator).fit(truth.posterior, seed=seed, callbacks=[path])
    return path.array


def pareto_share(points: dict[str, list[FloatArray]], index: int) -> float:
    """Return RB's share among the runs that no other run beats in both reward (column 1) and KL to the prior (column 2)."""
    labels = [label for label, runs in points.items() for _ in runs]
    reward, away = np.array([run[index, 1:3] for runs in points.values() for run in runs]).T
    beaten = ((reward[None] >= reward[:, None]) & (away[None] < away[:, None])).any(axis=1)
    beaten |= ((reward[None] > reward[:, None]) & (away[None] <= away[:, None])).any(axis=1)
    best = [label for label, is_beaten in zip(labels, beaten, strict=True) if not is_beaten]
    return best.count("RB") / len(best)


def _about_training(shares: dict[int, float]) -> Claim:
    """Return the verdict on the training by the Rao-Blackwellised gradient."""
    ahead = [share > 0.5 for share in shares.values()]
    listed = ", ".join(f"{share:.0%} after {step} steps" for step, share in shares.items())
    return Claim(
        "training by the Rao-Blackwellised gradient is more often on the Pareto front of reward and KL (78 % of it)",
        "reproduced" if all(ahead) else "partly" if any(ahead) else "not reproduced",
        f"its share of the front is {listed}. Its variance is lower far from the posterior only: at the posterior "
        "leave-one-out has none (theory.md 2.5)",
    )
