"""What a new token may see among the new tokens is an interval in depth-first order: token j is an
ancestor of token i, or i itself, iff enter[j] <= enter[i] < leave[j]. A plain chunk is the chain
enter[j] = j, leave[j] = n, so one kernel serves chunks, chains and trees.
"""

from tvm.script import tirx as T

NEVER = 2**31 - 1  # an `enter` that no query reaches
ALWAYS = -(2**31)
NO_WINDOW = 2**30


@T.inline
def key_of(slot, nth, end, position, QI, POS, ENTER, LEAVE, b, key):
    """key: position, enter and leave of a slot that is counted from kv_start; nth: which of the
    new tokens it is, if it is not negative."""
    key[0] = NEVER
    key[1] = NEVER
    key[2] = NEVER
    if slot < end:
        key[0] = position
        key[1] = ALWAYS
        if nth >= 0:
            key[0] = POS[QI[b] + nth]
            key[1] = ENTER[QI[b] + nth]
            key[2] = LEAVE[QI[b] + nth]
