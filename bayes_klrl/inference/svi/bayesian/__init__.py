"""A tuned policy with epistemic uncertainty about its parameters. Experimental: names and results may change.

Read `recipe` first (`BayesianSVI` and its result `BayesianFit`), then `programs` (the Pyro programs, their ELBO, the
predictive), `training` (the loop), `files` (saving and loading) and `uncertainty` (the disagreement of the policies).
"""
