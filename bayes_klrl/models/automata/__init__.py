"""Rewards and constraints that a finite automaton computes, so that exact answers exist at any length.

Read `automaton` first (states, transitions, products), then `reward` (an automaton as a likelihood), `regex` (a regular
expression as an automaton) and `tables` (transition tables as plain arrays, and their minimisation).
"""
