"""Warming: KV computed ahead of time for prefixes that are known, into the tiers or into a pack."""
