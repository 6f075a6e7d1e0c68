"""What runs on a GPU: conformance tests, sanitizers, the ledger. See `verify`."""
