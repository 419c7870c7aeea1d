"""What is slow in PyTorch on a CPU, in C.

Where there is no compiler, or with DARTSL_NATIVE=0, dartsl does without it, with the same results
up to rounding. What calls these functions has the formulas in PyTorch too.
"""
