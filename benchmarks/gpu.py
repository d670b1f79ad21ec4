"""Everything that a GPU can tell in a few minutes: `python -m benchmarks.gpu --budget 540 --out benchmarks/results/h200`.

`tritonconv bench` with all of its suites: in order of priority every candidate config of every kernel is checked, layers
are timed against cuDNN, those furthest from their roofline tuned, then blocks and models, and last the peers that
torch.compile makes. Made to be stopped and continued (--resume). With --dry-run no GPU is needed, and nothing is timed.
"""

from tritonconv_cli import bench

if __name__ == "__main__":
    bench(prog_name="python -m benchmarks.gpu")
