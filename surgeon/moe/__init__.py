"""A feed-forward layer as a mixture of experts: the module, its router, the split of its neurons, its knobs."""
