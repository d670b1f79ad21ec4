"""Rules that choose configs and tiles of kernels without a cost model, from sizes, layout and device; none was measured."""
