"""Products of matrices in place of a network's convolutions and linear layers, for drawing on a CPU."""
