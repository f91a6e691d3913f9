"""What is conditioned: language models, rewards, and the posterior as a Pyro program."""
