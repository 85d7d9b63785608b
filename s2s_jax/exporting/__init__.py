"""The trained model in files that other programs can run."""
