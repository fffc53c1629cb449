"""The paper's models in pure torch; nothing here knows a trainer."""
