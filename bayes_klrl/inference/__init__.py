"""How a posterior is answered: one algorithm, one file."""
