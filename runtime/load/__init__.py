"""From an index to a kernel that can be launched."""
