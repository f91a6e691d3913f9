"""Ranks: one training by several processes, each of which computes some of the completions of every step.

Read `group` first (who takes part, how numbers are exchanged, and how errors are), then `start` (what is refused before the
first step) and `interruption` (Ctrl-C). Which completions a rank computes is in `svi.pyro_backend.over_ranks`. Under
`accelerate launch` `SVI.fit` finds the group by itself; docs/ranks.md says how to start one.
"""
