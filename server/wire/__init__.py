"""What the HTTP process and the worker say to each other: messages, the channel that carries them, plain settings."""
