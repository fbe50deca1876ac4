"""A checkpoint's folder: what it holds, how it is written and read, and what is said of it."""
