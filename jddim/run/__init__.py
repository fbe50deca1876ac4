"""What runs a request: its problems, the compiled programs, the loop over batches, caches and progress."""
