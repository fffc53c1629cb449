"""Trained models in other people's evaluation harnesses."""
