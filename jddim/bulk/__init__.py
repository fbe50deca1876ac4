"""Large sets of images in shards: what a set is, the run that makes it, and what is done with a finished one."""
