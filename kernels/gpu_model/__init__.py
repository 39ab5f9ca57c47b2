"""A model of a layer's time on a GPU, from bytes and FLOPs, and the known numbers of each device."""
