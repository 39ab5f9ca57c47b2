"""Time feed-forward layers with experts, and compare them with other methods and with the limits of the machine.

`layer` makes a layer and selects experts for its tokens. `methods` computes the layer in several ways, and `timing`
times them in turn. `machine` describes the machine and its limits. `grid` runs many layers, and `whole` times a saved
surgery.
"""
