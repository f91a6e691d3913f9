"""Markov chains on completions.

Read `suffix_moves` first (a Metropolis-Hastings step: cut a completion and draw its end again), then `suffix_mh` (`SuffixMH`,
the chains, whose acceptance rates are in `Draws.info`) and `diagnostics` (R-hat and effective sample sizes).
"""
