"""Certificates: bounds on both KLs between a policy and the posterior, with a stated failure probability.

Read `certificate` first (`certify`), then `evidence` (the two ways to the intervals: enumeration and sampling), `intervals`
(from bounds on log Z to bounds on KLs), `alpha` (the alpha that the policy effectively solved for) and `coverage` (which modes
the policy dropped). `open_ends` says where an interval has no upper end. `groundwork` is what certificates of many policies
share, and the room `training_runs` certifies the checkpoints of other trainers. `record` holds the fields of a certificate;
`text` and `picture` show them, and `quoted` checks that a model card quotes one of its own guide.
"""
