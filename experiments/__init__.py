"""The experiment: how much accuracy compression costs and how much time it saves (``make experiment``)."""
