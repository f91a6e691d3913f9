"""Twists log psi: how much an unfinished completion is worth, the soft value function of RL divided by alpha.

Read `simple` first (a constant, and the reward so far), then `twisted_lm` (the prior steered one token ahead by a twist),
`counting` (a table of suffixes) and `neural` (a trained head). How twists are fitted is in `bayes_klrl.inference.twists`.
"""
