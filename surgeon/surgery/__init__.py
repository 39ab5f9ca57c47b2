"""Run passes over a model: the pipeline, its result, what it changed, and the directory it is saved to."""
