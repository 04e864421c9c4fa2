"""What a recipe will take of a machine, before it is started."""
