"""The HTTP face: OpenAI's routes and shapes, our additions, and nothing that knows of tensors."""
