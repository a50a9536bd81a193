"""Dataflow matching: what the values are, through the ways people write them."""
