"""Networks, one module per wiring. A checkpoint's config says which is built."""
