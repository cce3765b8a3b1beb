"""Integrations of fastcompress with models of other libraries."""
