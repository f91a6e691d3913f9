"""The benchmark of papers: its formulas against enumeration by hand, its records, its page, and every study in tiny."""

from __future__ import annotations

import doctest
import importlib
import itertools
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bayes_klrl.inference.exact.oracles import Enumerated
from bayes_klrl.inference.sampling.order_statistics import best_of_n_kl, best_of_n_kl_bound, best_of_n_win_rate
from bayes_klrl.problems import audit_posterior, gold_dense, gold_posterior, overoptimisation

ROOT = Path(__file__).parents[2]
# As a package of its own: the root, with its links, must not come onto sys.path.
if "benchmarks" not in sys.modules:
    package = types.ModuleType("benchmarks")
    package.__path__ = [str(ROOT / "benchmarks")]
    sys.modules["benchmarks"] = package
main, record, truth, amini2025, beirami2024, korbak2022, over_optimisation, zhao2024 = (
    importlib.import_module(f"benchmarks.papers.{name}")
    for name in (
        "__main__",
        "record",
        "truth",
        "amini2025",
        "beirami2024",
        "korbak2022",
        "over_optimisation",
        "zhao2024",
    )
)
LETTERS = np.log([0.1, 0.25, 0.3, 0.35])
REWARDS = {"no ties": np.array([0.3, -1.0, 2.0, 0.1]), "ties": np.array([1.0, 0.0, 1.0, 0.0])}


@pytest.mark.parametrize("module", [record, truth, amini2025, beirami2024], ids=lambda module: module.__name__)
def test_the_examples_in_docstrings_hold(module: types.ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_law_of_best_of_n_is_that_of_all_tuples_of_draws(name: str, n: int) -> None:
    """Every one of the 4^n tuples; ties are broken evenly among the n. Its KL and win rate are the package's."""
    prior, reward, law = np.exp(LETTERS), REWARDS[name], np.zeros(4)
    for drawn in itertools.product(range(4), repeat=n):
        best = [x for x in drawn if reward[x] == reward[list(drawn)].max()]
        for x in best:
            law[x] += np.prod(prior[list(drawn)]) / len(best)
    assert np.allclose(np.exp(truth.best_of_n_law(reward, n, LETTERS)), law, atol=1e-12)
    exact = float(law @ (np.log(law) - LETTERS))
    assert np.isclose(best_of_n_kl(reward, n, LETTERS), exact, atol=1e-12)
    assert exact <= best_of_n_kl_bound(n) + 1e-12
    wins = law @ ((reward[:, None] > reward) + 0.5 * (reward[:, None] == reward)) @ prior
    assert np.isclose(best_of_n_win_rate(reward, n, LETTERS), wins, atol=1e-12)


def test_the_estimate_is_exact_for_an_atom_on_top_of_a_continuum() -> None:
    """A continuum is the limit of many small atoms: the KL of one atom of mass eps above 200,000 others."""
    eps, n, small = 0.2, 8, 200_000
    log_prior = np.log(np.append(np.full(small, (1 - eps) / small), eps))
    exact = float(best_of_n_kl(np.arange(small + 1.0), n, log_prior))
    assert np.isclose(beirami2024.atom_estimate(np.array([eps]), n)[0], exact, atol=1e-4)
    assert exact < best_of_n_kl_bound(n) - 0.01  # so that the bound would not have passed


def test_every_kl_estimate_has_the_moments_of_its_definition() -> None:
    """Means and variances by loops over completions and prefixes, from probabilities of prefixes alone."""
    problem = Enumerated.of(audit_posterior())
    log_p0, log_q = problem.log_prior[0], problem.log_posterior(1 / problem.posterior.alpha)[0]
    tree, q = problem.tree, np.exp(log_q)
    found = amini2025.estimates(*amini2025.per_token(tree, log_q, log_p0))
    strings = [tuple(ids) for ids in tree.sequences.lists()]

    def next_token(log_law: np.ndarray, prefix: tuple[int, ...], token: int) -> float:
        """Return the probability of a token after a prefix, by sums over completions."""
        t = len(prefix)
        of_prefix = sum(math.exp(v) for v, x in zip(log_law, strings, strict=True) if x[:t] == prefix and len(x) > t)
        longer = (*prefix, token)
        return sum(math.exp(v) for v, x in zip(log_law, strings, strict=True) if x[: t + 1] == longer) / of_prefix

    for m in (0, 7, 23, 39):
        x, by_token, full = strings[m], 0.0, 0.0
        for t in range(len(x)):
            pairs = [(next_token(log_q, x[:t], a), next_token(log_p0, x[:t], a)) for a in range(4)]
            full += sum(a * math.log(a / b) for a, b in pairs)
            a, b = pairs[x[t]]
            by_token += b / a - 1 - math.log(b / a)
        k1 = log_q[m] - log_p0[m]
        expected = {"k1": k1, "k2": k1**2 / 2, "k3": math.exp(-k1) - 1 + k1, "k3 by token": by_token, "RB": full}
        assert {name: round(float(values[m]), 10) for name, values in found.items()} == {
            name: round(float(value), 10) for name, value in expected.items()
        }
    true = float(q @ (log_q - log_p0))
    controlled = amini2025.with_control(found, q)
    moments = {name: amini2025.moments(values, q) for name, values in controlled.items()}
    for name in ("k1", "k3", "k3 by token", "control", "RB"):
        assert np.isclose(moments[name][0], true, atol=1e-10), name
    assert abs(moments["k2"][0] - true) > 1e-3
    assert moments["RB"][1] < moments["k1"][1]
    assert moments["control"][1] <= min(moments["k1"][1], moments["k3"][1])  # c = 0 and c = 1


def test_the_figures_of_two_gaussians_are_those_of_quadrature() -> None:
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    for mu in amini2025.SCHULMAN:
        k1 = mu**2 / 2 - mu * nodes
        sds = [amini2025.moments(k, weights) for k in (k1, k1**2 / 2, np.expm1(-k1) + k1)]
        expected = [sd / (mu**2 / 2) for _, sd in sds] + [sds[1][0] / (mu**2 / 2) - 1]
        assert np.allclose(amini2025.gaussian_row(mu), expected, rtol=1e-8)


def test_lengths_are_measured_on_the_definitions() -> None:
    """Decoded over draws, l_t and KL_t are those of the enumerated tables."""
    posterior = gold_posterior(max_new_tokens=3)
    problem = Enumerated.of(posterior)
    policy = problem.policy(problem.tree.conditionals(problem.log_posterior(1 / posterior.alpha)))
    ratio, full = amini2025._drawn_per_token(policy.language_model(), posterior, problem.tree.sequences)
    expected = amini2025.per_token(problem.tree, policy.log_probs[0], problem.log_prior[0])
    assert np.allclose(ratio, expected[0], atol=1e-9)
    assert np.allclose(full, expected[1], atol=1e-9)


def test_the_standard_deviation_of_k3_by_messages_is_that_of_enumeration() -> None:
    posterior = gold_dense(max_new_tokens=4)
    found = truth.EnumeratedTruth.of(posterior)
    k1 = found.log_posterior - found.log_prior
    possible = found.log_prior > -100  # the prior never ends
    weights = np.exp(found.log_posterior[possible])
    exact = amini2025.moments(np.expm1(-k1[possible]) + k1[possible], weights / weights.sum())[1]
    assert np.isclose(amini2025.k3_sd_of_dense(4), exact, rtol=1e-8)


def test_the_share_of_undominated_runs() -> None:
    """Columns: step, reward, KL. The second run of each is beaten: by less KL, by more reward."""
    runs = {"RB": [[0, 1.0, 1.0], [0, 2.0, 3.0]], "other": [[0, 2.0, 2.0], [0, 0.5, 1.0]]}
    points: Any = {label: [np.array([run]) for run in of] for label, of in runs.items()}
    assert amini2025.pareto_share(points, 0) == 0.5


def test_the_identities_of_korbak_hold_to_rounding_and_can_fail() -> None:
    problem = Enumerated.of(audit_posterior())
    logits = torch.as_tensor(np.random.default_rng(0).standard_normal(problem.prior_table[0].shape))
    assert max(korbak2022.identities(problem, logits).values()) < 1e-12
    policy = korbak2022.TablePolicy(problem, logits)
    ratio = torch.as_tensor(problem.log_prior[0]) - policy.log_q
    ratio = ratio.exp()
    mean = policy.score_mean(ratio)
    assert torch.allclose(mean, policy.score_mean(ratio - 1), atol=1e-12)
    assert not torch.allclose(mean, policy.score_mean(ratio.square()), atol=1e-3)


def test_the_variance_of_a_score_is_that_of_draws() -> None:
    """The trace of the covariance from 4,000 draws, by its own standard error."""
    problem = Enumerated.of(audit_posterior())
    policy = korbak2022.TablePolicy(problem, torch.as_tensor(problem.prior_table[0]))
    ratio = (torch.as_tensor(problem.log_posterior(1 / problem.posterior.alpha)[0]) - policy.log_q).exp()
    scores = torch.stack([policy.grad(each).ravel() for each in policy.log_q]) * ratio.detach()[:, None]
    drawn = np.random.default_rng(1).choice(len(ratio), size=4000, p=np.exp(problem.log_prior[0]))
    squares = ((scores - policy.score_mean(ratio).ravel()).square().sum(dim=1))[torch.as_tensor(drawn)].numpy()
    z = (squares.mean() - policy.score_variance(ratio)) / (squares.std(ddof=1) / np.sqrt(len(squares)))
    assert abs(z) < 4


def test_the_gap_is_the_kl_to_the_nearest_posterior_and_the_posterior_has_none() -> None:
    found = truth.EnumeratedTruth.of(gold_posterior(max_new_tokens=4))
    mixture = np.logaddexp(found.log_posterior, found.log_prior) - np.log(2)
    grid = [truth.kl(mixture, found.tilted(b)) for b in np.linspace(0.0, 1 / found.posterior.alpha, 400)]
    assert np.isclose(found.gap(mixture), min(grid), atol=1e-5)
    assert found.gap(mixture) > 1e-3
    assert abs(found.gap(found.tilted(0.7))) < 1e-10


def test_each_kl_has_its_own_best_table() -> None:
    """The forward one in closed form: next tokens by expected counts under the posterior, E*[#(a b)] / E*[#a]."""
    found = truth.EnumeratedTruth.of(gold_posterior(alpha=0.25, max_new_tokens=3))
    tokens, inside, p = found.sequences.tokens[0], found.sequences.mask[0], np.exp(found.log_posterior)
    before = np.concatenate([np.full((len(tokens), 1), 3), tokens[:, :-1]], axis=1)
    counts = np.zeros((4, 4))
    np.add.at(counts, (before, tokens), p[:, None] * inside)
    log_table = np.log(counts / counts.sum(axis=1, keepdims=True))
    forward = np.where(inside, log_table[before, tokens], 0.0).sum(axis=1)
    assert 0 <= truth.kl(forward, zhao2024.fitted_table(found, "forward", 200)) < 1e-7
    reverse = zhao2024.fitted_table(found, "reverse", 200)
    assert truth.kl(reverse, found.log_posterior) < truth.kl(forward, found.log_posterior) - 1e-3


def test_forms_are_recovered_from_curves_of_their_own() -> None:
    d = np.linspace(0.0, 1.8, 400)
    for form, gold in (
        ("d (a - c d)", d * (1.5 - 0.6 * d)),
        ("d (a - c log d)", d * 1.5 - 0.6 * d * np.log(d.clip(1e-9))),
    ):
        a, c, r2 = over_optimisation.fit(over_optimisation.Curve(d**2, d, gold), form)
        assert np.allclose([a, c, r2], [1.5, 0.6, 1.0], atol=1e-3)


def test_curves_of_over_optimisation_start_at_the_prior_and_the_posterior_pays_least() -> None:
    problem = overoptimisation(20, max_new_tokens=4)
    bon, posterior = over_optimisation.best_of_n_curve(problem), over_optimisation.posterior_curve(problem)
    for curve in (bon, posterior):
        assert np.allclose([curve.kl[0], curve.proxy[0], curve.gold[0]], 0.0, atol=1e-12)
        assert (np.diff(curve.kl) > -1e-9).all()
    inside = bon.proxy[(bon.proxy > 0.1) & (bon.proxy < 0.9 * posterior.proxy[-1])]
    assert inside.size > 3
    assert (posterior.kl_of_proxy(inside) <= bon.kl_of_proxy(inside) + 1e-3).all()


def test_best_methods_are_those_within_the_noise_of_the_best() -> None:
    noise = np.array([0.0, 0.02, -0.02, 0.01, -0.01])
    kls = {"CTL": 1.0 + noise, "DPG": 0.5 + noise, "PPO": 0.5 + 2 * noise[::-1]}
    both = {name: np.stack([values, values], axis=1) for name, values in kls.items()}
    assert zhao2024.best_methods(both, 0) == {"DPG", "PPO"}


def test_records_are_written_and_refuse_what_is_none(tmp_path: Path) -> None:
    paper = record.Paper(
        "name",
        "title",
        "setting",
        (record.Claim("a", "reproduced", "b"), record.Claim("c", "not reproduced", "d")),
        (record.Table("caption", ("x", "y"), (("a | b", record.interval([1.0, 2.0])),)),),
        2,
    )
    assert paper.verdict == "partly"
    assert "| a \\| b | 1.500 ± 0.980 |" in paper.markdown()
    written = json.loads(paper.write(tmp_path / "new").read_text(encoding="utf-8"))
    assert written["verdict"] == "partly"
    assert written["tables"][0]["rows"][0][1]["mean"] == 1.5
    with pytest.raises(ValueError, match="verdict"):
        record.Claim("a", "maybe", "b")
    with pytest.raises(ValueError, match="cells"):
        record.Table("caption", ("x", "y"), (("a",),))


def test_the_page_has_every_paper_with_its_command() -> None:
    page = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    for name in main.NAMES:
        assert f"python -m benchmarks.papers {name}" in page
    files = {path.stem for path in (ROOT / "benchmarks" / "papers").glob("*.py")}
    assert set(main.NAMES) == files - {"__init__", "__main__", "over_optimisation", "picture", "record", "truth"}


@pytest.mark.slow
@pytest.mark.parametrize("name", main.NAMES)
def test_every_study_runs_in_tiny(name: str) -> None:
    paper = main.study(name, num_seeds=2, tiny=True)
    assert paper.claims
    assert paper.tables
    assert paper.cpu_seconds > 0
    assert json.loads(json.dumps(paper.markdown()))
    for table in paper.tables:
        assert table.rows
