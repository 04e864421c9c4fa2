"""Everything that knows that there is more than one rank. Takes plain values, never a recipe."""
