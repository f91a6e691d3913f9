"""What papers claim, measured again where the truth can be enumerated: `python -m benchmarks.papers`.

Read `record` first (a claim, its verdict and its tables, printed and written as JSON), then `truth` (both KLs, the
reward and the entropy of a guide, exactly, and intervals over seeds). Then each paper has one file with a function
`study`: `zhao2024` (twists and guides by both KLs), `go2023` (objectives by reward against diversity), `beirami2024`
(the KL of best-of-n), `amini2025` (the variance of KL estimators), `gao2022` (over-optimisation, whose curves
`over_optimisation` computes and `picture` draws) and `korbak2022` (the equivalences). docs/papers.md has the tables of
one run.
"""
