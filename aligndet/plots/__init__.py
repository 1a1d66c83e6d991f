"""Figures; curves and contact sheets need the extra ``aligndet[plots]``."""
