"""Other packages' calling forms, for code that was written for them."""
