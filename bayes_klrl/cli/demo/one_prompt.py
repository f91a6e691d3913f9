"""The posterior that `bayes-klrl` uses when no file is given: Jane Austen in a good mood.

Prior: the shipped language model. Likelihood: exp(sentiment / alpha), VADER's compound score of the completion, from -1 to
1. At alpha = 0.1 the posterior is about two nats from the prior. A file of your own needs no more than this.
"""

from __future__ import annotations

import bayes_klrl as bk
from bayes_klrl.models.rewards import sentiment

posterior = bk.Posterior(
    bk.TorchLM.from_pretrained("austen"),
    bk.Reward(sentiment, alpha=0.1, bounds=(-1, 1)),
    prompts="It was a fine morning",
    max_new_tokens=24,
)
