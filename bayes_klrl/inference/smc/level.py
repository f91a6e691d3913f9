"""The default twist of SMC: a constant that each population chooses for itself, so that its weights are most even.

Particle n stands for v_n = p0(x_1:t) / q(x_1:t) completions of the prior. If it has finished, its weight is
v_n exp(r_n / alpha). If not, its weight is v_n c, and c must have the scale of the likelihoods, or whoever ends first takes
the population. Of all constants this one makes the effective sample size of the population largest (theory.md 3.5):

    ESS(c) = (S + c V)^2 / (S_2 + c^2 V_2),    c = (S_2 / S) (V / V_2),

where S and S_2 are the sums of the weights of finished particles and of their squares, and V and V_2 the same sums of v_n
over unfinished ones. With the prior as proposal it is S_2 / S, the mean of the likelihood under the weights. A population is
then resampled only if its weights are degenerate whatever the constant.

c may depend on the particles, because log Z-hat is unbiased whatever they are resampled by, as long as each offspring gets
the inverse of it as weight: v_n = (mean weight) / psi_n.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bayes_klrl.typing import FloatArray
from bayes_klrl.weights import logsumexp

__all__ = ["most_even_level"]


def most_even_level(log_ratio: FloatArray, log_psi: FloatArray, finished: NDArray[np.bool_]) -> FloatArray:
    """Return log c of each population, shape (R,): the constant log psi of unfinished particles at which ESS is largest.

    It is NaN where every constant gives the same weights: where no particle of positive weight has finished, or none goes on.

    Parameters
    ----------
    log_ratio
        log v, the log-weights of the particles as draws from the prior, (R, N).
    log_psi
        Log-likelihood of finished particles, (R, N); other entries are not read.
    finished
        Which particles have finished, (R, N).

    Examples
    --------
    Two particles have finished with likelihoods 1 and 3, two go on; c = (1 + 9) / (1 + 3).

    >>> finished = np.array([[True, True, False, False]])
    >>> log_psi = np.log([[1.0, 3.0, 1.0, 1.0]])
    >>> np.exp(most_even_level(np.zeros((1, 4)), log_psi, finished)).round(6)
    array([2.5])
    """
    ended = np.where(finished, log_ratio + np.where(finished, log_psi, 0.0), -np.inf)
    going_on = np.where(finished, -np.inf, log_ratio)
    with np.errstate(invalid="ignore"):  # -inf - -inf
        level: FloatArray = logsumexp(2 * ended) - logsumexp(ended) + logsumexp(going_on) - logsumexp(2 * going_on)
    return level
