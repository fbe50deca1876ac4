"""The page of `jddim serve`: what is asked of it, the runs, and the files that a browser gets."""
