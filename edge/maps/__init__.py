"""Register maps that come with the product; a driver's `maps` adds others."""
