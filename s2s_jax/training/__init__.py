"""Train step, optimizer, growth of tables, and the training loop."""
