"""Several algorithms on one posterior, side by side.

Read `compare` first, then `rows` (the work as tasks for a runner), `table` (the numbers) and `picture`.
"""
