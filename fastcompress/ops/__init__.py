"""The public ops: checks, fakes, autograd and dispatch; one module an op."""
