"""Reward against KL to the prior over all alphas, from prior draws alone, before any training.

Read `frontier` first, then `draws` (what it starts from, and how far that reaches), `path` (the curves, estimated from one
pool of draws) and `curves` (what it returns), `extension` (where the draws do not reach, and whether what goes on there fits
them), `implied_alpha` (the place of a policy on the curve), `best_of_n_curve` (the rival beside it) and `path_points` (points
from other sources). `record` holds the fields of a frontier and its curves; `table` and `picture` show them.
"""
