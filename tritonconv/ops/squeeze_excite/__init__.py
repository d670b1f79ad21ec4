"""Squeeze-excite."""
