"""Measure cost and quality: multiply-adds of a call, sweeps over tau, a tau for each layer, and compensation."""
