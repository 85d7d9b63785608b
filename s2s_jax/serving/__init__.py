"""What a trained model is asked for: items ranked for users, and how good the ranking is."""
