"""Reward models: causal LMs with a scalar head, read through their input embeddings."""
