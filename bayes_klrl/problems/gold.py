"""Problems of any length with exact answers: small n-gram and hidden Markov priors with rewards that an automaton computes.

Their numbers are in theory.md 8, where P1 to P7 are what they are called here. All are solved by
`bayes_klrl.inference.exact.messages.backward_messages`, the small ones by enumeration as well.
"""

from __future__ import annotations

import numpy as np

from bayes_klrl.likelihood import TokenReward
from bayes_klrl.models.automata.automaton import Automaton
from bayes_klrl.models.automata.reward import AutomatonConstraint, AutomatonReward
from bayes_klrl.models.ngram_lm.hmm import HmmLM
from bayes_klrl.models.ngram_lm.lm import NgramLM
from bayes_klrl.posterior import Posterior
from bayes_klrl.typing import FloatArray, IntArray
from bayes_klrl.weights import logsumexp, normalised

__all__ = [
    "audit_posterior",
    "gold_constraint",
    "gold_counter",
    "gold_dense",
    "gold_hidden",
    "gold_posterior",
    "gold_table",
]

BOUNDS_SLACK = 1e-9  # sums of rewards round
_NEVER = -1e3  # EOS has no mass in double precision


def gold_table(eos_logit: float, num: int = 4) -> FloatArray:
    """Return the GOLD bigram table, theory.md 8.1: log-probs of shape (num, num), EOS the last token.

        logit(h, a) = sin(1.7 h + 2.3 a + 0.5 h a),  plus `eos_logit` for a = EOS;  rows are softmax(logits).

    The row of EOS doubles as the start, which is how `NgramLM` pads.

    Examples
    --------
    >>> gold_table(-0.5).shape
    (4, 4)
    """
    previous, token = np.indices((num, num))
    logits = np.sin(1.7 * previous + 2.3 * token + 0.5 * previous * token)
    logits[:, -1] += eos_logit
    log_probs: FloatArray = logits - logsumexp(logits)[:, None]
    return log_probs


def gold_posterior(alpha: float = 1 / 1.5, max_new_tokens: int = 6) -> Posterior:
    """Return problem P1 (and P2, at 50 and 200 tokens): EOS logit -0.5, and a reward for "0, and right after it 1".

        r(x) = sum_t r_a(x_t) + r_T(d),  r_a = (0, -0.2, 0.1, 0),  r_T = (0, 0.3, 2),

    d the final state of the automaton "contains 0 then 1". At the default (1093 completions) log Z =
    1.65238447, E[r] = 1.48690885 and KL(p* || p0) = 0.57797880.

    Examples
    --------
    >>> gold_posterior().log_joint([[1, 0, 1, 2, 3]]).round(6)
    array([[-1.847754]])
    """
    # The worst completion is 1, 1, 1, ...; the best one 0, 1, 2, 2, ...
    low, high = -0.2 * max_new_tokens, 2.0 - 0.2 + 0.1 * (max_new_tokens - 2)
    likelihood = AutomatonReward(
        Automaton.contains([0, 1], vocab_size=4, eos_token_ids=3),
        token_rewards=[0.0, -0.2, 0.1, 0.0],
        final_rewards=[0.0, 0.3, 2.0],
        alpha=alpha,
        bounds=(low - BOUNDS_SLACK, high + BOUNDS_SLACK),
        name="contains 0 1",
    )
    return Posterior(_gold_prior(-0.5), likelihood, max_new_tokens=max_new_tokens)


def gold_dense(alpha: float = 0.5, max_new_tokens: int = 10) -> Posterior:
    """Return problem P3: no EOS, r = number of 2s minus number of 1s. Importance sampling from the prior fails, SMC does not.

    At 10, 40 and 160 tokens log Z = 6.412374, 24.208230, 95.391655, and ESS / N of the prior 6.4e-6, 5e-22, 2e-86.
    """
    likelihood = AutomatonReward(
        Automaton(np.zeros((1, 4), dtype=np.int64)),
        token_rewards=[0.0, -1.0, 1.0, 0.0],
        alpha=alpha,
        bounds=(-max_new_tokens, max_new_tokens),
        name="2s less 1s",
    )
    return Posterior(_gold_prior(_NEVER), likelihood, max_new_tokens=max_new_tokens)


def gold_constraint(max_new_tokens: int = 20, *, eos_logit: float = _NEVER) -> Posterior:
    """Return problem P4: "never token 2", a hard constraint that becomes rare with length.

    log Z = log p0("never 2") = -1.7492, -6.3014, -24.4799, -97.1937 at 5, 20, 80 and 320 tokens. With `eos_logit` -6 it
    saturates, since ending early fulfils the constraint: the variant in which shortness is hacked.
    """
    never_2 = Automaton.forbids([2], vocab_size=4, eos_token_ids=3)
    return Posterior(
        _gold_prior(eos_logit), AutomatonConstraint(never_2, name="never 2"), max_new_tokens=max_new_tokens
    )


def gold_counter(modulo: int = 5, max_new_tokens: int = 20, *, alpha: float = 1 / 8) -> Posterior:
    """Return problem P5: no EOS, r = 1 if the number of 0s is m - 1 modulo m, known at the very end only.

    log Z = 6.324288 and 6.391903 for m = 5 at 20 and 100 tokens, .018909 and 5.360458 for m = 17.
    """
    counter = Automaton.counts(0, modulo=modulo, vocab_size=4, remainder=modulo - 1, eos_token_ids=3)
    likelihood = AutomatonReward(
        counter,
        final_rewards=np.arange(modulo) == modulo - 1,
        alpha=alpha,
        bounds=(0.0, 1.0),
        name=f"0s modulo {modulo}",
    )
    return Posterior(_gold_prior(_NEVER), likelihood, max_new_tokens=max_new_tokens)


def gold_hidden(num_hidden: int = 6, max_new_tokens: int = 100, *, alpha: float = 1 / 40) -> Posterior:
    """Return problem P7: a hidden Markov prior without EOS, and r = 1 if 2s stand in pairs only, a regular expression.

        A = softmax of 2 [z' = z] + sin(1.3 z + 2.1 z'),   E = softmax of 3 sin(0.9 z + 1.9 a + 0.7 z a),   p(z_1) uniform.

    Hidden states last long, so early tokens tell what is likely later: the optimal twist needs the filter.
    """
    state, following = np.indices((num_hidden, num_hidden))
    transitions = normalised(2.0 * (state == following) + np.sin(1.3 * state + 2.1 * following))
    state, token = np.indices((num_hidden, 4))
    emissions = normalised(3.0 * np.sin(0.9 * state + 1.9 * token + 0.7 * state * token))
    prior = HmmLM(np.full(num_hidden, 1 / num_hidden), transitions, emissions, eos_token_id=None)
    pairs = Automaton.regex("([^<2>]|<2><2>)*", vocab_size=4)
    likelihood = AutomatonReward(
        pairs, final_rewards=pairs.state_values, alpha=alpha, bounds=(0.0, 1.0), name="2s in pairs"
    )
    return Posterior(prior, likelihood, max_new_tokens=max_new_tokens)


def _gold_prior(eos_logit: float) -> NgramLM:
    """Return the GOLD bigram model, EOS the last of 4 tokens."""
    return NgramLM(gold_table(eos_logit), eos_token_id=3)


def audit_posterior(alpha: float = 0.4) -> Posterior:
    """Return a gamble on which trainers that differ in their KL part ways: 40 completions of at most 3 tokens.

        r(x) = 2 [x = 1 1 1] + [x_1 is 0 or 2] - |x| / 10     under GOLD with eos_logit 0.5

    After a first 1 the prize takes two tokens of probability 0.06 each: the posterior leaves it and takes what is sure, the
    myopic policies do not count what the gamble costs and take it. At the default, in nats: KL(p* || p0) = 0.59; KL of the
    myopic policy to p* 1.62, to the nearest posterior of any alpha 0.91.

    Examples
    --------
    >>> audit_posterior().reward([[1, 1, 1], [2, 3], [1, 1, 3]]).round(1)
    array([[ 1.7,  0.8, -0.3]])
    """

    def gamble(tokens: IntArray, lengths: IntArray) -> FloatArray:
        prize, sure = (tokens == 1).all(axis=1), np.isin(tokens[:, 0], (0, 2))
        reward: FloatArray = 2.0 * prize + sure - 0.1 * lengths
        return reward

    likelihood = TokenReward(gamble, alpha=alpha, bounds=(-0.3 - BOUNDS_SLACK, 1.7 + BOUNDS_SLACK), name="gamble")
    return Posterior(NgramLM(gold_table(0.5), eos_token_id=3), likelihood, prompts="", max_new_tokens=3)
