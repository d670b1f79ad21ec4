"""Seeded fuzzing against torch in fp64: single operators, and small networks that are converted.

python -m tests.fuzz                                    everything, as `make fuzz` runs it
python -m tests.fuzz operators --seed 0 --only 17       one call again, in this process
"""

import sys
from pathlib import Path

# The modules beside this package are imported by the names that tests give them.
sys.path.insert(0, str(Path(__file__).parents[1]))

# Sets TRITON_INTERPRET where there is no GPU, which must happen before triton is imported.
import conftest  # noqa: F401
