"""The places in a graph that a pass can change: linear layers and feed-forward layers, and how they are found."""
