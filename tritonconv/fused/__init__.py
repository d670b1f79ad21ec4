"""Functions that converted models call: several layers in one launch."""
