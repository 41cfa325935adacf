"""The engine's half in the HTTP process: jobs in flight, which worker has them, what their readers were given."""
