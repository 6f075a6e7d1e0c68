"""CuTe DSL attention kernels for SM120-class chips, a folder an op, and the table of them (`dispatch`)."""
