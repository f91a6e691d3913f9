"""Rewards and constraints that a finite automaton computes, so that exact answers exist at any length.

Read `automaton` first (states, products, minimisation), then `regex` (a pattern as an automaton), `tables` (the arrays that
both are made of) and `reward` (an automaton as a likelihood).
"""
