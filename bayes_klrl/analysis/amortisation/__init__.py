"""One guide for many prompts, judged on prompts that it never saw.

Read `amortise` first, then `judgement` (the guide and the prior on one set of prompts, with bounds). `record` holds the fields
of the result; `table` and `picture` show them.
"""
