"""The public ops: argument checks, fake kernels, autograd and dispatch. One module per op."""
