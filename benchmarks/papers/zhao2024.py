"""Zhao et al. (2024), twisted SMC: which learner is near the posterior in which KL.

Their tables compare proposals by KL(q || p*) and KL(p* || q), over five seeds. Here the same two KLs are exact, since
all completions are enumerated, on four posteriors: two tiny GPT-2 models with random rewards, an infilling task (what
follows a gap is given, as in theirs), and a GPT-2 too narrow to represent its posterior. Three methods of the package,
at one number of completions and with the package's own defaults:

    CTL   `bk.LearnedTwist`, as the twist-induced proposal `bk.TwistedLM`
    DPG   `bk.SVI(objective="forward_kl")`, from the guide's own weighted draws
    PPO   `bk.SVI(objective="elbo")`: the objective of PPO with a KL penalty, without its clipping

Their soft-Q, SIXO and FUDGE twists are not part of the package (theory.md 3.8).

A last table has no noise of gradients: a table of next tokens, which cannot represent the posterior of GOLD, is fitted
to each KL by exact gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import minimize

import bayes_klrl as bk
from bayes_klrl.problems import gold_posterior, gpt2_task, infilling, random_gpt2_task
from bayes_klrl.typing import FloatArray, LanguageModel
from benchmarks.papers.record import Cell, Claim, Paper, Table, interval
from benchmarks.papers.truth import EnumeratedTruth, kl

__all__ = ["METHODS", "POSTERIORS", "PUBLISHED", "best_methods", "fitted_table", "study"]

PUBLISHED = {
    "toxicity, T = 20": {"CTL": (1.11, 1.07), "DPG": (1.09, 1.12), "PPO": (0.98, 1.32)},
    "sentiment, T = 10": {"CTL": (0.55, 0.47), "DPG": (0.72, 0.57), "PPO": (1.04, 0.87)},
    "infilling, 15 + 10": {"CTL": (23.9, 8.9), "DPG": (13.3, 4.9), "PPO": (19.4, 14.1)},
    "infilling, 2 + 1": {"CTL": (0.47, 0.25), "DPG": (0.16, 0.14), "PPO": (0.52, 1.09)},
}
"""KL(q || p*) and KL(p* || q) of their tables, for the methods that are compared here."""

METHODS = ("CTL", "DPG", "PPO")
_Fitted = Callable[[bk.Posterior, int, int, int], LanguageModel]


def study(*, num_seeds: int = 5, tiny: bool = False) -> Paper:
    """Return the study: both KLs of each method on each posterior."""
    steps, draws = (3, 32) if tiny else (60, 256)
    chosen = {name: make() for name, make in POSTERIORS.items() if not tiny or name.startswith("narrow")}
    kls = {name: _both_kls(posterior, steps, draws, num_seeds) for name, posterior in chosen.items()}
    ours = Table(
        f"Ours: KL(q || p*) / KL(p* || q) in nats after {steps} steps of {draws} completions, {num_seeds} seeds",
        ("posterior", "K = KL(p* || p0)", *METHODS),
        tuple(_row(name, chosen[name], kls[name]) for name in chosen),
    )
    theirs = Table(
        "Published: KL(q || p*) / KL(p* || q), five seeds",
        ("posterior", *METHODS),
        tuple((name, *(f"{of[m][0]} / {of[m][1]}" for m in METHODS)) for name, of in PUBLISHED.items()),
    )
    limited = _limited(50 if tiny else 600)
    return Paper(
        "zhao2024",
        "Zhao et al. 2024, Probabilistic inference in language models via twisted sequential Monte Carlo",
        f"{len(chosen)} enumerated posteriors of tiny GPT-2 models, {steps} steps of {draws} completions for every method.",
        _claims(kls, limited),
        (ours, theirs, limited),
        num_seeds,
    )


def _endless_gpt2(vocab_size: int = 7) -> bk.TorchLM:
    """Return a random GPT-2 of width 48 without EOS, so that no completion is too short for a suffix."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"vocab_size": vocab_size, "n_positions": 32, "n_embd": 48, "n_layer": 2, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(**shape, **dropout, bos_token_id=0, eos_token_id=0, initializer_range=0.35)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return bk.TorchLM(GPT2LMHeadModel(config).eval(), eos_token_id=[])


POSTERIORS: dict[str, Callable[[], bk.Posterior]] = {
    "random reward, 7x5": lambda: gpt2_task("gpt2-7x5"),
    "random reward, 8x4, sharp": lambda: gpt2_task("gpt2-8x4-sharp"),
    "infilling, 4 + 3": lambda: infilling(4, 3, num_suffixes=1, prompt=[1, 2, 3], prior=_endless_gpt2()).posterior,
    "narrow GPT-2, 8x4": lambda: random_gpt2_task(1, hidden=8, layers=1),
}
"""What makes each posterior, by name."""


def _ctl(posterior: bk.Posterior, steps: int, draws: int, seed: int) -> LanguageModel:
    return bk.TwistedLM(posterior, bk.LearnedTwist(steps, num_draws=draws).fit(posterior, seed=seed))


def _svi(objective: str) -> _Fitted:
    def fitted(posterior: bk.Posterior, steps: int, draws: int, seed: int) -> LanguageModel:
        return bk.SVI(steps, draws, objective=objective).fit(posterior, seed=seed).guide

    return fitted


_FITTED: dict[str, _Fitted] = {"CTL": _ctl, "DPG": _svi("forward_kl"), "PPO": _svi("elbo")}


def _both_kls(posterior: bk.Posterior, steps: int, draws: int, num_seeds: int) -> dict[str, FloatArray]:
    """Return both KLs of each method, shape (seeds, 2)."""
    truth = EnumeratedTruth.of(posterior)
    return {
        name: np.array([truth.both_kls(fitted(posterior, steps, draws, seed)) for seed in range(num_seeds)])
        for name, fitted in _FITTED.items()
    }


def _row(name: str, posterior: bk.Posterior, kls: dict[str, FloatArray]) -> tuple[Cell, ...]:
    """Return a row of our table."""
    truth = EnumeratedTruth.of(posterior)
    distance = truth.frontier_kl(truth.mean_reward(truth.log_posterior))
    cells = (f"{interval(kls[m][:, 0])} / {interval(kls[m][:, 1])}" for m in METHODS)
    return (name, round(distance, 3), *cells)


def fitted_table(truth: EnumeratedTruth, direction: str, num_steps: int) -> FloatArray:
    """Return log q(x) of every completion, (M,), of the next-token table that exact gradients fit to one of both KLs."""
    tokens, inside = torch.as_tensor(truth.sequences.tokens[0]), torch.as_tensor(truth.sequences.mask[0])
    before = torch.cat([torch.full((len(tokens), 1), truth.posterior.pad_token), tokens[:, :-1]], dim=1)
    log_p, size = torch.as_tensor(truth.log_posterior), truth.posterior.prior.vocab_size

    def log_q(logits: torch.Tensor) -> torch.Tensor:
        return torch.where(inside, logits.reshape(size, size).log_softmax(dim=1)[before, tokens], 0.0).sum(dim=1)

    def value_and_gradient(at: FloatArray) -> tuple[float, FloatArray]:
        logits = torch.tensor(at, requires_grad=True)
        q, p = (log_q(logits), log_p) if direction == "reverse" else (log_p, log_q(logits))
        value = (q.exp() * (q - p)).sum()
        (gradient,) = torch.autograd.grad(value, logits)
        return float(value.detach()), gradient.numpy()

    options = {"maxiter": num_steps, "gtol": 1e-9, "ftol": 1e-15}
    found = minimize(value_and_gradient, np.zeros(size**2), jac=True, method="L-BFGS-B", options=options)
    result: FloatArray = log_q(torch.as_tensor(found.x)).numpy()
    return result


def _limited(num_steps: int) -> Table:
    """Return both KLs of the best next-token table in each direction."""
    truth = EnumeratedTruth.of(gold_posterior(alpha=1 / 4))
    rows = []
    for name, direction in (("forward KL (as DPG)", "forward"), ("reverse KL (as PPO)", "reverse")):
        log_q = fitted_table(truth, direction, num_steps)
        both = kl(log_q, truth.log_posterior), kl(truth.log_posterior, log_q)
        rows.append((name, *(round(value, 4) for value in both)))
    return Table(
        "Without noise, limited capacity: the best table of next tokens on GOLD (b = 4), by exact gradients",
        ("what is minimised", "KL(q || p*)", "KL(p* || q)"),
        tuple(rows),
    )


def _holds(found: Sequence[bool]) -> str:
    """Return the verdict on a claim about several posteriors."""
    return "reproduced" if all(found) else "partly" if any(found) else "not reproduced"


def _claims(kls: dict[str, dict[str, FloatArray]], limited: Table) -> tuple[Claim, ...]:
    """Return the verdicts on the two orderings, by means over seeds."""
    best = [{name: best_methods(of, direction) for name, of in kls.items()} for direction in (0, 1)]
    theirs = [[min(of, key=lambda m: of[m][d]) for of in PUBLISHED.values()] for d in (0, 1)]
    reverse = ["PPO" in methods for methods in best[0].values()]
    forward = [bool(methods - {"PPO"}) for methods in best[1].values()]
    (_, *dpg), (_, *ppo) = limited.rows
    return (
        Claim(
            "PPO (the KL-regularised return) is best on KL(q || p*)",
            _holds(reverse),
            f"best here: {_listed(best[0])}. In their own tables PPO is best in {theirs[0].count('PPO')} of {len(theirs[0])}",
        ),
        Claim(
            "CTL or DPG is best on KL(p* || q)",
            _holds(forward),
            f"best here: {_listed(best[1])}. In their tables CTL or DPG is best in "
            f"{len(theirs[1]) - theirs[1].count('PPO')} of {len(theirs[1])}",
        ),
        Claim(
            "each objective wins in its own KL when the guide cannot represent the posterior",
            _holds([float(ppo[0]) < float(dpg[0]), float(dpg[1]) < float(ppo[1])]),
            f"KL(q || p*) {ppo[0]} for the reverse, {dpg[0]} for the forward optimum; KL(p* || q) {ppo[1]} and {dpg[1]}",
        ),
    )


def best_methods(kls: dict[str, FloatArray], direction: int) -> set[str]:
    """Return the methods of the lowest mean KL, and those whose paired difference from it has an interval that holds 0."""
    lowest = min(kls, key=lambda name: float(kls[name][:, direction].mean()))
    difference = {name: interval(of[:, direction] - kls[lowest][:, direction]) for name, of in kls.items()}
    return {name for name, each in difference.items() if name == lowest or each.mean <= each.half_width}


def _listed(best: dict[str, set[str]]) -> str:
    return ", ".join(f"{' and '.join(sorted(methods))} ({name})" for name, methods in best.items())
