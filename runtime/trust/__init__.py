"""What may be loaded: `resolve`, and what it stands on."""
