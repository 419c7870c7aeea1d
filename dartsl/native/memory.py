"""How the C library treats memory that a step frees and the next one takes again."""

import ctypes

# Parameters of glibc's mallopt: from which size on memory goes back to the system as soon as it is
# freed, and how much may be free at the end of the heap; with the largest values that it takes.
LIMITS = {"M_MMAP_THRESHOLD": (-3, 2**25), "M_TRIM_THRESHOLD": (-1, 2**31 - 1)}


def keep_freed_memory() -> None:
    """Have this process keep memory that it frees.

    A search on a CPU frees gigabytes in every pass. Given back to the system, they are mapped and
    zeroed anew, page by page, in the next. C libraries other than glibc are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another library; no such thing on Windows
        return
    for parameter, value in LIMITS.values():
        mallopt(parameter, value)
