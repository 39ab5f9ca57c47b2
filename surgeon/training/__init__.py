"""Training for passes: the training loop, fine-tuning, distillation, penalties, routers, and activations on data."""
