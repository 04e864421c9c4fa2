"""Studies made with the framework: topologies compared, depth probed."""
