"""Stochastic variational inference: a guide is trained on the ELBO, which is KL-regularised RL, exactly.

Read `svi` first (`SVI`, the recipe), then `fit` (`Fit`, its result), `loop` (the steps, their history, interruption) and
the seams that know nothing of one another: `objectives` (what is minimised, with critics and replay), `estimators` (the
leave-one-out baseline), `optimizers` and `steps` (how a step is made, how long it is, and which prompts it uses),
`callbacks` (who looks, loggers among them), `checkpoint` (what survives), `ranks` (one training by several processes) and
`refusals`. The rooms `pyro_backend` and
`numpyro_backend` each hold the training, the ELBO and the sites of one library; `bayesian` (experimental) puts a
distribution on the policy's parameters. `losses` are reference losses of trainers, functions of `loss_inputs`, as
`bk.audit` takes them.
"""
