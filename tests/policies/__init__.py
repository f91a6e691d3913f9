"""Folders that TRL 1.16 wrote, small enough to be kept here, and `make`, the script that trained them."""
