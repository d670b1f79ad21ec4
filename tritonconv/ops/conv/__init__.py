"""Convolution: dense, transposed, depthwise, separable, with batch norm in training, forward and backward."""
