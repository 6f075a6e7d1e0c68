"""`bwd_preprocess`: what the backward needs of each query row."""
