"""Problem P9, infilling: the text between a beginning and an end, under a real language model.

    p*(x | c, y) prop. to p0(x | c) p0(y | c, x),      phi(x) = p0(y | c, x) <= 1

log Z = log p0(y after T tokens) is out of reach, and yet an exact posterior draw is free: draw x and y jointly from the
prior and condition on that y (Grosse et al. 2015). So each suffix here comes with the text that was really before it, and
two-sided bounds on log Z with it. Zhao et al. (2024) put the problem to twisted SMC, with T = 15 and 10 tokens of suffix, and
T = 2 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bayes_klrl.arrays import no_gradient, to_host
from bayes_klrl.batch import completion_texts
from bayes_klrl.checks import check_count
from bayes_klrl.errors import BudgetError
from bayes_klrl.inference.smc.conditional import ConditionalSMC
from bayes_klrl.inference.smc.sandwich import PairedRuns, sandwich
from bayes_klrl.inference.smc.smc import SMC
from bayes_klrl.likelihood import TokenReward
from bayes_klrl.models.decoding import decode
from bayes_klrl.posterior import Posterior
from bayes_klrl.problems.record import Truth
from bayes_klrl.randomness import generator, stream_seed
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, IntArray, LanguageModel

__all__ = ["Infilling", "infilling", "infilling_truth"]

_TOKENS_PER_CHUNK = 2**14
_MAX_JOINT_DRAWS = 10_000


@dataclass(frozen=True, eq=False)
class Infilling:
    """Problem P9: one prompt with P suffixes, and the texts that were really drawn between them.

    Parameters
    ----------
    posterior
        The prompt P times, each with a suffix of its own (column `suffix`, if the prior has texts).
    exact
        One exact posterior draw per prompt, shape (P, 1, T): for `certify(posterior, policy, exact=...)`.
    suffixes
        The suffixes as token ids, shape (P, c).
    """

    posterior: Posterior
    exact: Sequences
    suffixes: IntArray


def infilling(
    num_tokens: int = 15,
    num_suffix: int = 10,
    *,
    num_suffixes: int = 8,
    prompt: str | list[int] = "It was a fine morning",
    prior: LanguageModel | None = None,
    seed: int = 0,
) -> Infilling:
    """Return problem P9.

    Parameters
    ----------
    num_tokens
        T, the length of the gap.
    num_suffix
        c, the number of tokens of the suffix.
    num_suffixes
        P, the number of suffixes, drawn independently: bounds on the mean of log Z tighten with it.
    prompt
        The text before the gap.
    prior
        The language model; None: the shipped one.
    seed
        Seed for the joint draws.

    Notes
    -----
    A completion that ends before the gap is filled has likelihood 0. A joint draw is kept if x fills the gap and y has c
    tokens: both can be seen from y (a text that has ended has none), so x given y is still a posterior draw. Evaluating the
    likelihood runs the prior over x and y; these tokens are not in `model_tokens`, which counts what draws and weighs
    completions.
    """
    for name, value in (("num_tokens", num_tokens), ("num_suffix", num_suffix), ("num_suffixes", num_suffixes)):
        check_count(name, value)
    if prior is None:
        from bayes_klrl.models.torch_lm.lm import TorchLM

        prior = TorchLM.from_pretrained("austen")
    # A posterior of the right length checks prompt and context, and encodes the prompt as every posterior does.
    whole = Posterior(prior, _never_asked(), prompts=[prompt], max_new_tokens=num_tokens + num_suffix)
    (prompt_ids,) = whole.prompt_ids
    drawn = _joint_draws(prior, prompt_ids, num_tokens + num_suffix, num_suffixes, seed)
    gaps, suffixes = drawn[:, :num_tokens], drawn[:, num_tokens:]
    likelihood = TokenReward(
        SuffixLogProb(prior, prompt_ids, suffixes), alpha=1.0, bounds=(-np.inf, 0.0), name="log p0(suffix)"
    )
    texts = suffixes.tolist() if prior.tokenizer is None else completion_texts(prior, gaps.tolist(), suffixes.tolist())
    posterior = Posterior(
        prior, likelihood, prompts=[prompt] * num_suffixes, max_new_tokens=num_tokens, suffix=list(texts)
    )
    exact = Sequences(gaps[:, None], np.full((num_suffixes, 1), num_tokens))
    return Infilling(posterior, exact, suffixes)


def infilling_truth(
    problem: Infilling,
    *,
    num_particles: int = 1024,
    num_runs: int = 2,
    failure_probability: float = 0.05,
    seed: int = 0,
) -> Truth:
    """Return two-sided bounds on log Z, from SMC below and conditional SMC above (see `certify`).

    Parameters
    ----------
    problem
        A problem made by `infilling`.
    num_particles
        K, the particles of each run: more of them make narrower bounds.
    num_runs
        Number of SMC runs for the lower bound; for the upper bound there is one run per exact draw.
    failure_probability
        The probability that one of the two ends fails, for each suffix, and for the mean over suffixes.
    seed
        Seed for all random numbers.
    """
    posterior = problem.posterior
    smc, _ = SMC(num_particles).prepared(posterior, stream_seed(seed, 0, "pilot"))
    below = smc.log_evidences(posterior, num_runs, seed=stream_seed(seed, 0, "lower bound")).log_evidence
    above = ConditionalSMC(smc).log_evidences(posterior, problem.exact, seed=stream_seed(seed, 0, "upper bound"))
    # `sandwich` gives each end a quarter of its failure probability, as part of a certificate of four statements
    bounds, mean_bounds = sandwich([PairedRuns(below, above.log_evidence)], 2 * failure_probability)
    bounds, mean_bounds = np.minimum(bounds, 0.0), np.minimum(mean_bounds, 0.0)  # Z is a mean of probabilities
    return Truth.between(bounds, mean_bounds, f"SMC and conditional SMC, {num_particles} particles")


@dataclass(frozen=True, eq=False)
class SuffixLogProb:
    """log p0(y | c, x), -inf where x ended too early for anything to follow.

    Parameters
    ----------
    prior, prompt_ids
        The prior p0 and the ids of the prompt c.
    suffixes
        The suffix y of each prompt of the posterior, shape (P, c).
    """

    prior: LanguageModel
    prompt_ids: tuple[int, ...]
    suffixes: IntArray

    def __call__(self, tokens: IntArray, lengths: IntArray, prompt_index: IntArray) -> FloatArray:
        """Return it for N completions of width T, shape (N,)."""
        width = tokens.shape[1]
        open_ended = (lengths == width) & ~np.isin(tokens[:, -1], list(self.prior.eos_token_ids))
        values = np.full(len(tokens), -np.inf)
        joined = np.concatenate([tokens, self.suffixes[prompt_index]], axis=1)[open_ended]
        if not len(joined):
            return values
        distinct, which = np.unique(joined, axis=0, return_inverse=True)  # short gaps are drawn again and again
        values[open_ended] = self._of(distinct, width)[which.ravel()]
        return values

    def _of(self, joined: IntArray, width: int) -> FloatArray:
        """Return log p0(y | c, x) of rows that hold x, `width` tokens, and y."""
        values = np.empty(len(joined))
        step = max(1, _TOKENS_PER_CHUNK // joined.shape[1])
        with no_gradient():
            for start in range(0, len(joined), step):
                part = joined[None, start : start + step]
                whole = Sequences(part, np.full(part.shape[:2], part.shape[2]))
                scored = to_host(self.prior.token_log_probs([self.prompt_ids], whole))[0, :, width:]
                values[start : start + step] = np.minimum(scored.sum(axis=1, dtype=np.float64), 0.0)
        return values


def _joint_draws(prior: LanguageModel, prompt_ids: tuple[int, ...], width: int, num: int, seed: int) -> IntArray:
    """Return `num` prior draws that are all of `width` tokens, (num, width)."""
    rng, kept, tried = generator(seed), np.empty((0, width), dtype=np.int64), 0
    while len(kept) < num:
        if tried >= _MAX_JOINT_DRAWS:
            raise BudgetError(
                f"Only {len(kept)} of {tried:,} texts went on for {width} tokens, {num} are needed. Ask for a shorter gap or "
                "suffix, or for fewer suffixes."
            )
        drawn = decode((prior,), [prompt_ids], 2 * num, width, rng)
        whole = drawn.lengths == width
        kept = np.concatenate([kept, drawn.tokens[whole]])
        tried += 2 * num
    return kept[:num]


def _never_asked() -> TokenReward:
    """Return a likelihood for a posterior that is only made to check its arguments."""
    return TokenReward(lambda tokens, lengths: np.zeros(len(tokens)), alpha=1.0)
