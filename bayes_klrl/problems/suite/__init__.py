"""Methods against problems with known truth, each with the same number of model tokens.

Read `run` first (`run_suite`), then `catalogue` (the problems), `methods` (how each method spends its tokens), `table` and
`picture`.
"""
