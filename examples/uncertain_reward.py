"""Preferences, a reward model with its uncertainty, and generations that carry it.

`python examples/uncertain_reward.py` (about half a minute; needs the extra jax).

Somebody prefers lively sentences that are not too long. 100 noisy comparisons of the shipped model's sentences show it; NUTS
infers the weights of four features, with their uncertainty. The cut posterior then generates. For every sentence it gives the
uncertainty of its reward, and for the number of words the share of its variance that more comparisons would remove.
"""

from __future__ import annotations

import numpy as np

import bayes_klrl as bk

PROMPT = "It was a fine morning"


def features(completions: list[str]) -> list[list[float]]:
    """Return the features that the reward may depend on: bounded, so that no rare completion has an extreme reward."""
    return [[float("!" in c), float('"' in c), min(c.count(","), 3), len(c.split())] for c in completions]


def taste(completions: list[str]) -> np.ndarray:
    """Return the true reward, which the model does not know: speech and exclamations, and not too many words."""
    return np.array(features(completions)) @ [1.0, 1.0, 0.0, -0.1]


def asked(prior: bk.LanguageModel, num: int, seed: int) -> bk.Preferences:
    """Return comparisons of pairs of prior draws, answered by the Bradley-Terry model."""
    anything = bk.Posterior(prior, bk.Reward(taste, alpha=1.0), prompts=PROMPT, max_new_tokens=16)
    texts = bk.ImportanceSampling(2 * num).run(anything, seed=seed).texts()[0]
    pairs = [(a, b) for a, b in zip(texts[:num], texts[num:], strict=True) if features([a]) != features([b])]
    first = np.random.default_rng(seed).random(len(pairs))
    chosen = [u < 1 / (1 + np.exp(np.diff(taste(list(pair)))[0])) for u, pair in zip(first, pairs, strict=True)]
    return bk.Preferences.labelled(PROMPT, [a for a, _ in pairs], [b for _, b in pairs], chosen)


def main() -> tuple[bk.RewardPosterior, bk.RewardUncertainty]:
    prior = bk.TorchLM.from_pretrained("austen")
    fit = bk.RewardModel(features).fit(prior, asked(prior, 100, seed=0), seed=0)
    print(fit, fit.diagnostics.table().round(2), sep="\n", end="\n\n")
    new = asked(prior, 200, seed=1)
    chance = fit.predict(new)
    promised = np.maximum(chance, 1 - chance).mean()
    print(f"{len(new)} new comparisons: {np.mean(chance > 0.5):.0%} foretold, {promised:.0%} promised", end="\n\n")

    posterior = bk.Posterior(prior, fit.reward(alpha=1.0), prompts=PROMPT, max_new_tokens=16)
    draws = bk.SMC(256).run(posterior, seed=2)
    uncertain = bk.reward_uncertainty(posterior, draws)
    some = uncertain.table().iloc[::43]
    print(repr(uncertain))
    print(some[["text", "reward_mean", "reward_sd"]].round(2).to_string(index=False))
    parts = uncertain.decompose(lambda texts: [len(text.split()) for text in texts])
    print(
        f"words: mean {parts.mean[0]:.1f}, sd {parts.total[0] ** 0.5:.1f}, of the variance the reward's: {parts.share[0]:.0%}"
    )
    return fit, uncertain


if __name__ == "__main__":
    main()
