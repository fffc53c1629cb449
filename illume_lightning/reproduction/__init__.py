"""Doing a recorded run again, and holding what comes out against the record."""
