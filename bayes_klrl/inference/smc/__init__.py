"""Sequential Monte Carlo: particles that grow token by token, and bounds on the evidence made of them.

Read `smc` first (`SMC`), then `population` (how particles grow, are weighted and resampled), `level` (the default twist),
`runs` (what is decoded together), `spread` (runs and islands as tasks of a runner), `outcome` (the finished particles) and
`conditional` (with one retained completion: upper bounds). `evidence_bounds` turns independent runs into bounds on log Z that
hold with a stated probability, and `sandwich` joins bounds from several ways of sampling. `annealing` tempers
whole completions over alpha instead, with a `swarm` of them.
"""
