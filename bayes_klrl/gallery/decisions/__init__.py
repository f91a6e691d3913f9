"""Examples whose completions are actions or labels, so that the posterior is exact.

Read `soft_values` first: a gridworld as a language model over actions. `bayesian_value` and `bayesian_policy` explore by what
they are unsure of, `reward_hacking` has a reward that is only an estimate; in `classification` and `image_classification`
the completion is one label.
"""
