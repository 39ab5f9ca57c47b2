"""Trace a model into a graph of ATen ops that computes the same, in training and in evaluation."""
