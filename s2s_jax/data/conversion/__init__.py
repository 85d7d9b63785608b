"""What only `data.convert` needs: where events are, how they are cut, chosen and grouped."""
