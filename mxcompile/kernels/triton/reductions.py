"""How reductions and scans of the kernels join two values: `tl.reduce(x, axis, plus)`.

`tl.max` and `tl.sum` are calls of several functions each, and Triton's own functions cannot run in the interpreter as
the tests start it.
"""

# pyright: basic, reportGeneralTypeIssues=false
# As in triton/elements.py: strict checking reports false errors in jit functions.

import triton
import triton.language as tl


@triton.jit
def maximum(a, b):
    """The larger one."""
    return tl.maximum(a, b)


@triton.jit
def plus(a, b):
    """The sum."""
    return a + b
