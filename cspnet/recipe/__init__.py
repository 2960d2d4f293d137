"""Recipes: what to train, and everything that changes the numbers of a run."""
