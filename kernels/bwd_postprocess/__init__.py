"""`bwd_postprocess`: dq of its accumulator."""
