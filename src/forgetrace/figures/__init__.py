"""Plots and image grids of an experiment; reads tables and images, computes nothing."""
