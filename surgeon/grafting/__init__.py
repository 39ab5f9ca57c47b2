"""Put converted layers back into the model they came from: a model of its own class that runs experts."""
