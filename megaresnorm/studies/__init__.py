"""Studies made with the framework: comparison of topologies, and a probe of the effects of depth."""
