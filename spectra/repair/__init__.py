"""A fine-tune changed, written again, and checked."""
