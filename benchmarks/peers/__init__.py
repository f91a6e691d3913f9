"""What a user would run instead of this package, on the same models, prompts, rewards and budgets: `make peers`.

The peers are `generate` of transformers, TRL, llamppl, genlm-control and disco, each in a process of its own. There are
three kinds of task: SAMPLING draws completions of a given length; EVIDENCE estimates a log Z that is known by enumeration;
TUNING trains a policy whose KLs to the posterior are computed by enumeration.

Read `map` first (which cells there are, and which rows each has), then `models` and `truth` (the checkpoints that all peers
read, and the true answers), then `measure` (how a process times itself) and `ours`; `generate`, `trl_peer`, `llamppl_peer`,
`genlm_peer` and `disco_peer` do the same with another library. `run` alternates them and writes what `report` draws.
"""
