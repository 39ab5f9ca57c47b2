"""The dynamic-k FFN in torch code: for any device, forward and backward."""
