"""FP8: how numbers become codes with scales, and products of those."""
