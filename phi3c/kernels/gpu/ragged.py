"""Which sequence of a batch a workgroup has, where sequences take as many as they need."""

from tvm.script import tirx as T


def sequence_of(size: int):
    """Returns the inline function `find(indptr, batch, place, found)`: found[0] is the sequence
    that a place is of.

    A sequence has a place for each `size` of its entries, from indptr[b] // size + b on: there is
    room for all, and none overlap.
    """

    @T.inline
    def find(indptr, batch, place, found):
        found[0] = 0
        for b in T.serial(T.Cast("int32", batch)):
            if place >= indptr[b] // size + b:
                found[0] = b

    return find


@T.inline
def find_sequence(indptr, shift, batch, place, found):
    """The same where a place is for 2^shift entries, which a kernel knows only when it runs."""
    found[0] = 0
    for b in T.serial(T.Cast("int32", batch)):
        if place >= T.shift_right(indptr[b], shift) + b:
            found[0] = b
