"""One file an operation; each registers itself."""
