"""An interpreter of Gluon kernels for Hopper: partitions, mbarriers, TMA and wgmma on the CPU.

    trace = run(kernel, programs, arguments, schedule=Random(seed), num_warps=8)

Runs a `gluon.jit` function as the Python function it is, with stand-ins for Gluon's names, on torch's CPU tensors. Copies
and products happen later, in an order that the schedule's seed draws. What a GPU would answer with a hang, a race or
garbage is a `Fault`, and what the interpreter does not know is `Refused`. Most faults are found whatever the order: each
thread is held to what it can know from the barriers it has passed.

Layouts are carried along and mean nothing: whether they suit is the compiler's to say, and so is what fits into registers.
A partition is one thread; that its warps run apart shows in fences and barriers alone.
"""

from .errors import Fault, Refused
from .runs import run
from .schedules import Random, Timed
from .trace import Event, Trace

__all__ = ["Event", "Fault", "Random", "Refused", "Timed", "Trace", "run"]
