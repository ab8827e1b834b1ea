"""The mesh of devices, and everything that devices send to each other."""
