"""What a fine-tune does to W0, as operators.  No names, no paths."""
