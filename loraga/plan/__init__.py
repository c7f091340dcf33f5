"""Predictions of what an initialisation needs, from the shapes of a model without weights."""
