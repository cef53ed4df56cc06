"""The generated stubs of the interface of Token Broker."""
