"""What asks many things and keeps the answers: `compare`, `eval`, `sample` and `batch` of the command line.

`engine` sends requests to servers and keeps a journal, from which a run that was stopped goes on. `sources` reads
prompts, `sweep` makes requests of prompts and settings, `answers` reads what came back, `statistics`, `plots` and
`report` tell it.
"""
