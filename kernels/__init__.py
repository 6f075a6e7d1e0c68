"""CuTe DSL attention kernels for SM120-class chips, their parameter lists (`abi`) and the table (`dispatch`)."""
