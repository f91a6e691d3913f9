"""Independent draws: importance sampling, rejection sampling, quasi-rejection sampling and best-of-n.

Read `importance` first, over `drawing` (N completions per prompt with all that they are judged by) and `proposals` (what may
propose). `rejection` and `quasi_rejection` share `accept_reject`; `best_of_n` has its exact law in `order_statistics`.
"""
