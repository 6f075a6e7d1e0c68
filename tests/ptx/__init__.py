"""Execute PTX on the CPU: see `interpreter`."""
