"""A number whose multiples modulo 1 spread evenly, however many are taken, and keep step with nothing."""

GOLDEN = (5**0.5 - 1) / 2
