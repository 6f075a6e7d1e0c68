"""`bwd_sum`: dK and dV of the group splits' parts."""
