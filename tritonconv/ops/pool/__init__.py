"""Pooling over windows, and max unpooling."""
