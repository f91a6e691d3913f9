"""Exact inference: the reference that every other algorithm is tested against.

Read `exact` first (`Exact`, the algorithm), then `enumeration` (every completion) and `messages` (backward messages for
n-gram and hidden Markov priors, at any length). Messages are built from `prior_chains` and `backoff_chain` (priors as chains
of states), `backward_pass` (the recursion) and `summaries` (moments and marginals). `message_lm` makes a language model and
a twist from solved messages, `exact_draws` chooses a method that gives exact posterior draws, and `oracles` computes the
policies that losses converge to.
"""
