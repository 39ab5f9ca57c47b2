"""The traced graph: its definition, how to call, read, edit and compare it, and who owns its parameters."""
