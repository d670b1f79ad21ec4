"""Fusion of layers as a pass over a graph that torch traced."""
