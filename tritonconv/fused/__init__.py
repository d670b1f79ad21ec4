"""What converted models call: layers in one launch."""
