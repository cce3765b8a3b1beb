"""Read the machine code of the CUDA kernels and predict their speed. No GPU is needed; ``__main__`` has the command."""
