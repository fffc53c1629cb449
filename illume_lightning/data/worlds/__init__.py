"""Worlds: data that needs no download, or one small one.

`shapes` is generated from a seed, `photographs` come with installed packages, `emoji` are fetched from
the npm registry.
"""
