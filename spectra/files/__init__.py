"""Bytes to named tensors, and back.  Nothing here executes a file, and nothing decomposes a weight."""
