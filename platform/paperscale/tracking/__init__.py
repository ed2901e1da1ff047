"""The W&B run of a training run: one identity over all ranks and attempts, never in the way of training."""
