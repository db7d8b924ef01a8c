"""An Azure IoT Hub stand-in for the unmodified device SDK."""
