"""Sums of neighbouring threads, many at once, through shared memory: on every GPU alike."""

from tvm.script import tirx as T

_HELPERS = 16  # threads that share a sum, at most


def pitch_of(lanes: int) -> int:
    """Places in shared memory for the parts of a sum of `lanes` threads: one more than there are,
    so that threads that add up one sum each meet no two in a bank.

    The buffers are one-dimensional: TVM takes such padding out of two-dimensional ones.
    """
    return lanes + 1


def lanes_sum(lanes: int):
    """Returns the inline function `add_up(S, s, total)`: total[0] = sum s of those whose parts are
    in S, shared.
    """

    @T.inline
    def add_up(S, s, total):
        total[0] = T.float32(0)
        for k in T.serial(lanes):
            total[0] += S[s * pitch_of(lanes) + k]

    return add_up


def helpers_of(sums: int, threads: int) -> int:
    """Threads that can share a sum."""
    return max(1, min(_HELPERS, threads // sums))


def helped_sums(sums: int, lanes: int, helpers: int):
    """Returns the inline function `share(S, H, t)`: H[s·helpers + h], shared, becomes a part of sum
    s of those in S (as above). All threads t of the workgroup come by; H has a place for each.

    Many lanes would be a long way for one thread.
    """

    @T.inline
    def share(S, H, t):
        part = T.alloc_buffer((1,), "float32", scope="local")
        part[0] = T.float32(0)
        s = T.meta_var(T.min(t // helpers, sums - 1))
        for k in T.serial((lanes + helpers - 1) // helpers):
            if lanes % helpers == 0:
                part[0] += S[s * pitch_of(lanes) + k * helpers + t % helpers]
            else:
                if k * helpers + t % helpers < lanes:
                    part[0] += S[s * pitch_of(lanes) + k * helpers + t % helpers]
        H[t] = part[0]

    return share
