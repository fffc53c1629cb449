"""One page about a whole schedule: scores, pictures, curves and records of its runs (needs matplotlib, Jinja2)."""
