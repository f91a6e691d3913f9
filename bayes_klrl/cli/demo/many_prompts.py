"""The posteriors that `bayes-klrl amortise` uses when no file is given: Jane Austen in a good mood, however she begins.

Prior and likelihood are those of `one_prompt`. One guide is trained on the prompts of `posterior` and judged on those of
`held_out`. A file of your own needs no more than these two; `svi` is optional.
"""

from __future__ import annotations

import bayes_klrl as bk
from bayes_klrl.cli.demo.openings import TRAINING, UNSEEN
from bayes_klrl.models.rewards import sentiment

prior = bk.TorchLM.from_pretrained("austen")
cheerful = bk.Reward(sentiment, alpha=0.1, bounds=(-1, 1))
posterior = bk.Posterior(prior, cheerful, prompts=TRAINING, max_new_tokens=24)
held_out = bk.Posterior(prior, cheerful, prompts=UNSEEN, max_new_tokens=24)
