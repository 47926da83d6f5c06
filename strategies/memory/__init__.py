"""Memory accounting: estimate, track, measure and plot the memory of training steps."""
