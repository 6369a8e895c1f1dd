"""Where blocks live. Tiers never import each other, the index or the store."""
