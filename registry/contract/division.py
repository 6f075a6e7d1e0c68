"""How kernels divide by a number that a call fixes."""


def fast_divmod(divisor: int) -> tuple[int, int]:
    """(magic, shift) with n // divisor == n · magic >> shift for 0 ≤ n < 2**31, the product below 2**63.

    Granlund & Montgomery, Division by Invariant Integers using Multiplication, 1994.
    """
    shift = 31 + (divisor - 1).bit_length()
    return -(-(1 << shift) // divisor), shift
