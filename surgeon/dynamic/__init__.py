"""The layers that skip work by tau: where they are, and the knobs that can be turned after training."""
