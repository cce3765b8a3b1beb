"""Compare compression rules on a model and data of the user: ``fastcompress sweep``."""
