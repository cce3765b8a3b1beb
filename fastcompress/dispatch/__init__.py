"""Dispatch: op schemas, the compiled library, the choice of a backend, and the call of an op."""
