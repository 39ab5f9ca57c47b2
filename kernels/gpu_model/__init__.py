"""What a layer should take on a GPU: a model of its time by bytes and FLOPs, and what is known of each device."""
