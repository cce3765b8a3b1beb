"""The experiment: what compression costs and saves, from data to plot (``make experiment``)."""
