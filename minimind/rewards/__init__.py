"""Rewards of completions: one module for each part, weighted and added up by `weighted`."""
