"""The tasks whose answer is known, and that answer: posteriors over so few completions that all of them are summed.

reward       a random reward of whole completions, KL(p* || p0) = 2 nats: `bayes_klrl.problems.gpt2_task("gpt2-8x4")`
constraint   two tokens must not occur, which a prefix shows at once; likelihood 0 or 1, on the prior of "gpt2-7x5"
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

import bayes_klrl as bk
from bayes_klrl.inference.exact.enumeration import enumerated_posterior
from bayes_klrl.posterior import completion_log_probs
from bayes_klrl.problems import GPT2_TASKS, gpt2_task

__all__ = ["FORBIDDEN", "TASKS", "distances", "forbidden_twist", "log_evidence", "look_up", "task"]

FORBIDDEN = (2, 5)
TASKS = ("constraint", *GPT2_TASKS)


@cache
def task(name: str) -> bk.Posterior:
    """Return the posterior of one of `TASKS`."""
    if name != "constraint":
        return gpt2_task(name)
    base = gpt2_task("gpt2-7x5")
    first, second = (
        bk.Automaton.forbids([token], vocab_size=base.prior.vocab_size, eos_token_ids=base.pad_token)
        for token in FORBIDDEN
    )
    return bk.Posterior(
        base.prior,
        bk.AutomatonConstraint(first.product(second)),
        prompts=[list(base.prompt_ids[0])],
        max_new_tokens=base.max_new_tokens,
    )


def forbidden_twist(_posterior: bk.Posterior, _prompt_index: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
    """Return log psi of prefixes (R, t) of the task "constraint", shape (R,): -inf where a forbidden token was drawn."""
    return np.where(np.isin(prefixes, FORBIDDEN).any(axis=1), -np.inf, 0.0)


@cache
def _enumerated(name: str) -> bk.Draws:
    return enumerated_posterior(task(name), method="enumeration")


def log_evidence(name: str) -> float:
    """Return log Z of a task, in nats, by enumeration."""
    return float(_enumerated(name).log_evidence[0])


def look_up(name: str) -> dict[str, float]:
    """Return log-likelihoods r(x) / alpha by completion, written as its token ids: the reward of every peer."""
    draws = _enumerated(name)
    rows = zip(draws.tokens[0].tolist(), draws.lengths[0].tolist(), draws.log_likelihood[0].tolist(), strict=True)
    return {" ".join(map(str, tokens[:length])): value for tokens, length, value in rows}


def distances(name: str, folder: Path) -> tuple[float, float]:
    """Return KL(q || p*) and KL(p* || q) of the policy in a folder, in nats, by enumeration."""
    posterior, draws = task(name), _enumerated(name)
    policy = bk.TorchLM.from_pretrained(folder, eos_token_id=posterior.pad_token)
    outcomes = bk.Sequences(draws.tokens, draws.lengths)
    log_q = completion_log_probs(policy, posterior.prompt_ids, outcomes)[0]
    log_p = draws.log_prior[0] + draws.log_likelihood[0] - draws.log_evidence[0]
    likely = np.isfinite(log_p)
    reverse = np.exp(log_q) @ (log_q - log_p)
    forward = np.exp(log_p[likely]) @ (log_p - log_q)[likely]
    return float(reverse), float(forward)
