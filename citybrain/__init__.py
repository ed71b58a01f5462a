"""The kernel: what every part of the product speaks. It imports no other part."""
