"""The jobs of the commands as functions, without a command line."""
