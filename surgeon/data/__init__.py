"""Data for fitting and measuring: batches, files, samples for each task, losses and padding."""
