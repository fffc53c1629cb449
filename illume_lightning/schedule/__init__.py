"""One command for a whole chain of `illume` commands: each done once, in order, whatever interrupts it.

The standard library, OmegaConf and tqdm only: it starts at once, and what it starts brings its own libraries.
"""
