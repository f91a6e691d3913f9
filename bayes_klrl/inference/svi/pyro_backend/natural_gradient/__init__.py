"""The natural gradient of the ELBO on torch guides.

Read `steps` first (the optimizer at work), then `regression` (log-weights on scores: direction, damping, momentum),
`per_sample` (scores of single draws) and `score_products` (their products, layer by layer).
"""
