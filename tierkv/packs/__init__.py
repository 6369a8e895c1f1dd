"""Packs: the KV of known prefixes as an artefact that is built once, checked, signed, shipped and mounted."""
