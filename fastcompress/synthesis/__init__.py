"""Synthetic speech with manifests, for machines that have no data."""
