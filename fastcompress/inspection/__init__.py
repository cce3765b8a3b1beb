"""``fastcompress inspect``: what rules do to an audio file, as a table and as a picture."""
