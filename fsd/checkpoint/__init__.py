"""What outlives a server: taken, written, verified, put in place again."""
