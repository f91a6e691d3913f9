"""The posterior as a probabilistic program, and a language model as its guide, in Pyro and in NumPyro.

Read `pyro_program` first; `numpyro_program` is its twin, over `numpyro_distribution` (a language model as a distribution over
completions) and `traced_rewards` (rewards inside a jitted program). `completion_features` and `traced_features`
compute features f(x) of completions, from which a program's reward may be built. In `turns`
threads wait for each other.
"""
