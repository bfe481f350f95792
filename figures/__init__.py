"""The papers' figures, which visualize.py draws: each a function of its arguments and a device that
returns the figure and, as a list of dicts, the numbers behind it."""
