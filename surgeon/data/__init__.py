"""What fitting and measuring read: batches, files of them, samples for each task, losses and padding."""
