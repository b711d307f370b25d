"""What is published about bone age systems, what this project measured itself, and what may be compared with what."""
