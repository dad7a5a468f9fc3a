"""The machine: devices, checkpoints, logs; knows nothing of the method."""
