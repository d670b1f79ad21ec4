"""What every operator shares: backends, launches, calls seen before, memory formats, what follows in a kernel."""
