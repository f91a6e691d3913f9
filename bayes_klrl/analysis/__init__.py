"""Statements about answers: which method is better, how far a policy is from the posterior, which alpha to choose.

Read `contract` first (what every posterior must fulfil, checked by running it). The rooms are `plan` (tokens and memory of a
run, before it runs), `comparison` (algorithms side by
side), `amortisation` (one guide for many prompts, judged on unseen ones), `certificate` (bounds on the distance of a policy to
the posterior), `frontier` (reward against KL over all alphas), `audit` (what a trainer's loss converges to),
`report` (results as one HTML page) and `callbacks` (a training that is analysed while it runs).
"""
