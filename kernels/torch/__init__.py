"""The dynamic-k FFN in torch code, forward and backward, for any device."""
