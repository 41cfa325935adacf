"""Benchmarks of the engine: programs that print a table, then one JSON line. The server imports nothing from here."""
