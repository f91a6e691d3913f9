"""Several algorithms on one posterior, side by side.

Read `compare` first, then `table` (the numbers) and `picture`.
"""
