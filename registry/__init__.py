"""The contract that every room shares (`registry.contract`) and the store of cubins (`registry.store`)."""
