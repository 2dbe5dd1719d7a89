"""GGUF files: their headers, the parts that a model is split into, and the names and orders of its tensors."""
