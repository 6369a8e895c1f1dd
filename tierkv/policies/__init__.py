"""What a tier forgets and what it lets in. Pure: no clock, lock, I/O or torch."""
