"""Doors of others to our operators: torch's scaled_dot_product_attention, and flash-attention's functions."""
