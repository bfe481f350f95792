"""What no paper claims: images, runs, weight files."""
