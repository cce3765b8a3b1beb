"""How a call of an op reaches a kernel: schemas, the compiled library, the choice of a backend, and the call itself."""
