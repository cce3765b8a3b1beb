"""Training, evaluation and manifests, for the reference model and for stock audio LLMs."""
