"""Scores of trained runs on held-out data: what `illume evaluate` writes."""
