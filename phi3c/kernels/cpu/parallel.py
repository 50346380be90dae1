"""When a small kernel is worth a parallel launch.

The pool's workers sleep between launches (runtime/threads.py says why), so a launch costs 10 to
50 µs, more where an idle core is halted.
"""

SERIAL_ROWS = 16  # of 1 to 2 µs: a norm, rounding to int8
SERIAL_LONG_ROWS = 4  # of 10 to 20 µs: a rotation and its append
