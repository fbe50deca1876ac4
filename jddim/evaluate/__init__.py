"""How good images are: distances between sets, and the small network that looks at digits."""
