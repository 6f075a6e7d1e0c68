"""`fwd_paged`: the forward over a cache."""
