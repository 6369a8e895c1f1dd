"""What a card does, measured against what it could do: for `tierkv bench` and for bench/gpu."""
