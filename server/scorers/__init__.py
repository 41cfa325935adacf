"""Scorers that are not loaded here: Python functions in child processes, and other servers over HTTP."""
