"""The commands of `s2s`: one file each, with a function `main(argv)` that returns the exit code."""
