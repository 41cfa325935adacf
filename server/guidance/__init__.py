"""Reward guidance: the plain loop that reads like the paper, and the fast loop that is tested against it."""
