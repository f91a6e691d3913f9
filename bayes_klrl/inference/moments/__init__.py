"""Posteriors that are defined by given means of features instead of by a reward.

Read `constraints` first (`moment_constraint`), then `feasibility` (the check that some distribution has these means).
"""
