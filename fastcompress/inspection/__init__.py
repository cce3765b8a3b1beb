"""Implementation of ``fastcompress inspect``: compare compression rules on an audio file, as a table and a picture."""
