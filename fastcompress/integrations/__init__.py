"""fastcompress inside other people's models."""
