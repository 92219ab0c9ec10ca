"""HOW it is passed on: soft labels, losses, batches, the training loop."""
