"""The worker process: it owns one device and runs one denoising step after the other."""
