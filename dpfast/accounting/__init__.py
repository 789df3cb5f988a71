"""ε of the steps that were taken, the noise multiplier for a given ε, and which run took which steps."""
