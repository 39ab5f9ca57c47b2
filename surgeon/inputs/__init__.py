"""Layers that skip inputs or neurons by a threshold on their own values: sites, calibration and modules."""
