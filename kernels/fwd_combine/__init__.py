"""`fwd_combine`: the weighted sum of partial outputs."""
