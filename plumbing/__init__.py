"""What no paper claims: files, images, runs, figures, weights."""
