"""Helpers that several tests use."""

from pathlib import Path

#: The checkout.
ROOT = Path(__file__).resolve().parents[2]
