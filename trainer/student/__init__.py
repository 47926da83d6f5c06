"""Turns the trained model into the final student: quantizes it, exports it, reloads the files and compares them."""
