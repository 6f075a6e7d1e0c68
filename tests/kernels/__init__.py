"""Every variant's PTX, executed on the CPU."""
