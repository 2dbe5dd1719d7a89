"""Which tensor of the fine-tune meets which of the base, decided from headers."""
