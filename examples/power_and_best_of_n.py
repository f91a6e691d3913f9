"""Certify a power sampler and a policy that imitates best-of-n: `python examples/power_and_best_of_n.py` (a few seconds).

Both are posteriors, so that "how good is this sampler?" has an answer in nats.

Power sampling wants p0(x)^a, texts as likely as the prior finds them, sharpened. Decoding at temperature 1 / a sharpens every
token by itself, which is another distribution: it takes the likely first word, whatever may follow. SMC corrects it.

Best-of-n draws n texts and keeps the best. Its evidence is known, 1 / n, so the ELBO of a policy trained to imitate it (here
by SVI, at the cost of one draw instead of n) says how far it is from best-of-n, with no further work.
"""

import numpy as np

import bayes_klrl as bk

WELL, TWO, AND, AGAIN, ARE, FOUR, END = range(7)  # "well", "two", "and", "two" once more, "are", "four", "."
POWER, N = 3.0, 8


def prior() -> bk.NgramLM:
    """Return a model of two answers: it often begins with "well" and then says anything, else it surely says one sentence."""
    table = np.full((7, 7), 1e-3)
    table[END, [WELL, TWO]] = 0.6, 0.4  # the first word
    table[WELL, :] = 1.0
    for word, following in ((TWO, AND), (AND, AGAIN), (AGAIN, ARE), (ARE, FOUR), (FOUR, END)):
        table[word] += 0.05
        table[word, following] += 2.0
    return bk.NgramLM(np.log(table / table.sum(axis=1, keepdims=True)), eos_token_id=END)


def starts(draws: bk.Draws) -> float:
    """Return the share of the draws, by weight, that begin with "two"."""
    return float((draws.weights * (draws.tokens[..., 0] == TWO)).sum())


def power_sampler() -> tuple[bk.Posterior, bk.NgramLM, bk.Certificate, bk.Draws]:
    """Return the power posterior, decoding at a low temperature with its certificate, and SMC's draws."""
    lm = prior()
    posterior = bk.Posterior(lm, bk.Power(POWER), max_new_tokens=6)
    sharper = POWER * lm.log_probs
    local = bk.NgramLM(sharper - np.logaddexp.reduce(sharper, axis=-1, keepdims=True), eos_token_id=END)
    certificate = bk.certify(posterior, local, seed=0)
    # the same local proposal, whose mistakes are the weights of the particles
    draws = bk.SMC(256, proposal="twisted", twist=bk.Power(POWER).twist()).run(posterior, seed=0)
    return posterior, local, certificate, draws


def variety(draws: bk.Draws) -> float:
    """Return the mean number of different words, by weight."""
    return float((draws.weights * [different(*row) for row in zip(draws.tokens, draws.lengths, strict=True)]).sum())


def different(tokens: np.ndarray, lengths: np.ndarray) -> list[int]:
    """The score of best-of-n: the number of different words, for tokens (N, T) and lengths (N,)."""
    return [len(set(x[:length])) for x, length in zip(tokens.tolist(), lengths, strict=True)]


def best_of_n() -> tuple[bk.Posterior, bk.LanguageModel, bk.Certificate]:
    """Return the posterior that is best-of-n, the guide that imitates it, and its certificate."""
    score = bk.TokenReward(different, alpha=1.0)
    posterior = bk.Posterior(prior(), bk.BestOf(N, score, num_reference=None), max_new_tokens=5)
    fit = bk.SVI(num_steps=100).fit(posterior, seed=0)
    return posterior, fit.guide, bk.certify(posterior, fit.guide, seed=0)


def main() -> None:
    """Print both certificates and what they show."""
    posterior, _, certificate, draws = power_sampler()
    exact = bk.Exact().run(posterior, seed=0)
    print(f"--- temperature {1 / POWER:.2g}, token by token, against p0^{POWER:g}: {certificate}\n")
    print(
        f'begins with "two": {starts(exact):.3f} of p0^{POWER:g}, {starts(certificate.draws):.3f} of the low temperature, '
        f"{starts(draws):.3f} of SMC with 256 particles\n"
        f"log evidence {exact.log_evidence[0]:.3f}, by SMC {draws.log_evidence[0]:.3f}\n"
    )
    posterior, _, certificate = best_of_n()
    prior_draws = bk.ImportanceSampling(1024).run(
        bk.Posterior(posterior.prior, bk.Power(1.0), max_new_tokens=5), seed=0
    )
    print(f"--- a guide against best-of-{N}: {certificate}\n")
    print(
        f"log evidence by theory {-np.log(N):.3f}, found {certificate.pooled.log_evidence_bounds.mean():.3f}\n"
        f"different words: {variety(prior_draws):.2f} of a draw of the prior, {variety(certificate.draws):.2f} of one draw of "
        f"the guide, {variety(bk.Exact().run(posterior, seed=0)):.2f} of the best of {N}"
    )


if __name__ == "__main__":
    main()
