"""The sites in a graph that a pass can change, linear layers and feed-forward layers, and the search for them."""
