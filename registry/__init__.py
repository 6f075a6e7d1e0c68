"""The contract that every room shares (`registry.contract`) and the store of cubins (`registry.store`)."""

__version__ = "0.1.0"
