"""What shows the progress of long work: on a terminal, in a notebook, and as lines where neither is.

The command line and, with `progress=True`, the functions of Python use the same.
"""
