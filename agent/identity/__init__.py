"""Who this device is to its IoT Hub: where that is written down, and how it is proven."""
