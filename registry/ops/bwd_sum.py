"""`bwd_sum`: placeholder until merged"""
