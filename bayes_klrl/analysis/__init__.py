"""Statements about answers: which method is better, how far a policy is from the posterior, which alpha to choose.

Read `contract` first (what every posterior must fulfil, checked by running it). The rooms are `comparison` (algorithms side by
side), `certificate` (bounds on the distance of a policy to the posterior), `frontier` (reward against KL over all alphas) and
`audit` (what a trainer's loss converges to).
"""
