"""Inference algorithms: each takes a posterior and returns draws or a policy, one algorithm per file.

Read `sampling.importance` first, which is the shortest, then `smc.smc` with `smc.population`. The rooms are `sampling`
(independent draws), `exact` (enumeration and backward messages), `mcmc` (Markov chains), `smc` (particles, and bounds on the
evidence), `twists` (how twists are fitted), `svi` (tuned policies) and `moments` (constraints on means). `policies` turns a
checkpoint of any trainer into a language model that the algorithms take, and `same_posterior` refuses draws of another
posterior. docs/extending.md writes a new algorithm from beginning to end.
"""
