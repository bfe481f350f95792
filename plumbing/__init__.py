"""What no paper claims: files, images, runs, drawing, weights."""
