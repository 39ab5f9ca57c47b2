"""Linear layers that read only the inputs that matter: sites, calibration and modules."""
