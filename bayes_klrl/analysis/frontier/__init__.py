"""Reward against KL to the prior over all alphas, from prior draws alone, before any training.

Read `frontier` first, then `path` (the curves, estimated from one pool of draws), `draws`, `grid` and `extension` (where the
draws do not reach), `implied_alpha` (the place of a policy on it), `best_of_n_curve` (the rival beside it) and `path_points`
(points from other sources). `record` holds the fields of a frontier and its curves; `table` and `picture` show them.
"""
