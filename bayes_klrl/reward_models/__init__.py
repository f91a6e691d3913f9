"""Rewards that are themselves inferred from data: preferences or scores in, an uncertain reward out.

Read `model` first (`RewardModel`: features, a prior, and NUTS), with `preferences` (the data), `features` (what a linear
reward weighs) and `numpyro_program` (the model). `posterior` holds the draws of the weights and `ensemble` makes a likelihood
of them, with `anchors` (the evidence of each draw) and `targets` (three ways to use the uncertainty, from one pool of draws).
`uncertainty` splits the variance of answers, and `datatree` exports to ArviZ.
"""
