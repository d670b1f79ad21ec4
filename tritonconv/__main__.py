"""`python -m tritonconv` is the command line."""

from tritonconv.cli import main

if __name__ == "__main__":
    main(prog_name="tritonconv")
