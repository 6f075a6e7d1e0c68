"""`fwd`: the forward over dense and packed keys."""
