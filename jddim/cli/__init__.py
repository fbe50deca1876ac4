"""The command line: one file a command, their options, and the parser that puts them together."""
