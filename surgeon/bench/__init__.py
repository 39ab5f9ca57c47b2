"""Time feed-forward layers with experts beside other ways to compute them, and against what the machine can do.

`layer` makes a layer and what its tokens select, `methods` are the ways, `timing` times them in turn, `machine` says
what they ran on and how fast that could be, `grid` goes through a grid of layers, `whole` times a saved surgery.
"""
