"""Tests that train with TRL itself; `make trl` installs it apart and runs them."""
