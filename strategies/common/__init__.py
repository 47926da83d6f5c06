"""What several strategies need and none owns."""
