"""Hit rates of request traces: the real index and the real policies, without bytes."""
