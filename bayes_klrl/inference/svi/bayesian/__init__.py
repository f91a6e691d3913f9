"""A tuned policy with epistemic uncertainty about its parameters. Experimental: names and results may change.

Read `recipe` first (`BayesianSVI`), then `fit` (`BayesianFit`, its result), `training` (the Pyro programs, their ELBO and the
loop), `files` (what is saved) and `uncertainty` (what the policies disagree about).
"""
