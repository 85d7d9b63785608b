"""The command line: the arguments, help texts and exit codes of the commands."""
