"""Direct methods: what an operator may ask of the device, over any transport and on the device."""
