"""What the hardware can do, decided before anything is loaded."""
