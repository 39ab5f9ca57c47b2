"""Early exits: places in a classifier where samples leave, their heads, and the graph that skips what is left."""
