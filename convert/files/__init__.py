"""Everything that reads bytes of files one did not write: nothing in a file is ever executed."""
