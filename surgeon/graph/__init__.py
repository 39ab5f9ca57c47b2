"""The traced graph: what it is, how it is called, read, edited, compared, and who owns its parameters."""
