"""Data for the examples, most of it what other packages ship.

Read `verses` first. `novels`, `questions` and `digits` read other texts and images, and `conversations` has some that the
project wrote.
"""
