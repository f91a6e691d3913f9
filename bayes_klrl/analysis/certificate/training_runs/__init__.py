"""The runs of other trainers: what they logged, what their checkpoints are, and a certificate of each checkpoint.

Read `curve` first (`certify_checkpoints`), then `checkpoints` (which folders of a run are whole), `trainer_log`
(trainer_state.json), `findings` (what log, adapter and KL to the prior say together) and `picture`.
"""
