"""Graphs for engines other than torch."""
