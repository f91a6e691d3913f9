"""Twists log psi: the value of an unfinished completion, in RL the soft value function divided by alpha.

Read `simple` first (a constant, and the reward so far), then `twisted_lm` (the prior times a twist, as a proposal) and
`neural` (a trained head). The training of twists is in `bayes_klrl.inference.twists`.
"""
