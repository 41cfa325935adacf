"""Judges of answers that are not in the loop, for the bundled models.

`python -m clients.quality judge` reads what `python -m clients compare` kept, `fluency` checks unguided answers, and
`shortcuts` measures what is not exact. The judges are development tools: `pip install -r
clients/quality/requirements.txt`.
"""
