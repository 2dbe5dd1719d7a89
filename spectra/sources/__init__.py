"""What the user names becomes a checkpoint: a path, a model on the hub, an address, a model in memory."""
