"""Configurations of earlier versions: their `config.json`, and their keys."""
