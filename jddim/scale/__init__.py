"""Other ways to run a `DDIM`: on many devices, step by step, over many etas, as a file."""
