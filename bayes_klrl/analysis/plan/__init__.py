"""What a run would take, before it runs: tokens, and memory item by item, for a model that need not be loaded.

Read `plan` first (the public function), then `work` (the tokens and rows of each algorithm, in the words of `setting`),
`training` (those of what is fitted first), `needs` (their memory) and `record` (what is returned).
"""
