"""Write the student, reload it where it will be used, compare, and give a receipt."""
