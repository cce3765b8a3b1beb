"""Kernels that are written in Python, a package a language; importing this one imports none of them."""
