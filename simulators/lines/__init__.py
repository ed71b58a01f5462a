"""Counterparts of the drivers on real lines: pseudo-terminals and sockets."""
