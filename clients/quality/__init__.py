"""Does guidance help, and at what price? Measured over HTTP, with judges that are not in the loop.

`python -m clients.quality` compares the guidance methods; `python -m clients.quality fluency` checks unguided
answers. The judges are development tools: `pip install -r clients/quality/requirements.txt`.
"""
