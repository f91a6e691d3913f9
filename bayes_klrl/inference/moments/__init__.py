"""Posteriors that are defined by the means they must have, instead of by a reward.

Read `constraints` first (`moment_constraint`), then `feasibility` (whether any distribution has such means).
"""
