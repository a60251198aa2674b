"""Lanes, calibration and activation offload: what turns kernels and codecs into something a program calls."""
