"""What runs came to: tables."""
