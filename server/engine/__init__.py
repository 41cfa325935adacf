"""The engine: an asyncio face in the HTTP process, and a worker process that owns the device and runs the loop."""
