"""Rows on screen: tokens with the loss mask over them."""
