"""MQTT without I/O (packets, codec, sessions) and the broker on it."""
