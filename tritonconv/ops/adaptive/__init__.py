"""Adaptive and global pooling."""
