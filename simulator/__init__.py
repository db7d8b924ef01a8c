"""Everything around a device, without hardware or cloud: hub, broker, registry, boards."""
