"""Files of this machine and of stores: their addresses, reading and writing them."""
