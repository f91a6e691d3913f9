"""Methods against problems with known truth, each with the same number of model tokens.

Read `run` first (`run_suite`), then `catalogue` (the problems) and `methods` (how each method spends its tokens). `cell` is
one answer, judged by the truth; `table` and `picture` show all of them.
"""
