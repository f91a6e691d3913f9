"""A posterior of your own, for the command line: `bayes-klrl compare examples/two_prompts.py`.

Two prompts, a reward that reads a column of its own, and a hard constraint. A file like this must define `posterior`; it may
define `algorithms`, which `compare` then runs instead of the usual ones.
"""

import bayes_klrl as bk


def mentions(completions: list[str], wanted: list[str]) -> list[float]:
    """Return 1 for a completion with the wanted word in it; `wanted` is a column of the posterior, as in TRL."""
    return [float(word in text.lower()) for text, word in zip(completions, wanted, strict=True)]


def is_short_enough(completions: list[str]) -> list[bool]:
    """Return whether each completion has at most 80 characters."""
    return [len(text) <= 80 for text in completions]


posterior = bk.Posterior(
    bk.TorchLM.from_pretrained("austen"),
    bk.Reward(mentions, alpha=0.25, bounds=(0, 1)) * bk.Constraint(is_short_enough),
    prompts=["She went to the", "He said that the"],
    wanted=["house", "letter"],
    max_new_tokens=16,
)

algorithms = {
    "prior IS": bk.ImportanceSampling(1000),
    "SMC": bk.SMC(256),
    "best of 8": bk.BestOfN(8, 64),
}
