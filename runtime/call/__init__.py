"""From a call's arguments to launches."""
