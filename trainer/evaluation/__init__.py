"""What is measured of a student."""
