"""The command line under the package's name; tritonconv_cli.py has it, which answers `--help` before torch is imported."""

from tritonconv_cli import main

__all__ = ["main"]
