"""The C library that decodes and resizes images, and how it is compiled."""
