"""Is everything a device needs in place: checks with a remedy each, and a bundle for support."""
