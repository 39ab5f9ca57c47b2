"""What passes train with: the one loop, fine-tuning, distillation, penalties, routers, activations on data."""
